"""Checkpoint in, complete compressed model directory out."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline.architectures.model_config import ModelConfig
from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.compression.job import CompressLayer, LayerReport, copy_task
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Destination, Job, Task, TaskResult
from pipeline.errors import UserError
from pipeline.outputs.card_content import card_of_compression
from pipeline.outputs.preflight import begin_with_room, identity_of, names_of, require_unmixed
from pipeline.outputs.report import build_report
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from pipeline.outputs.stage import run_output_stage
from pipeline.outputs.transaction import CALIBRATION, Output, abandon, finish
from pipeline.planning.cost_model import compression_bytes, device_bytes
from pipeline.planning.plan import Plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import CALIBRATION_KEY
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord, Store
from pipeline.tuning.job import ApplyTuning
from pipeline.tuning.tuner import TunedValues
from pipeline.variants.resumed import VERIFIED, Ingredients
from swsc_core.compressed.config_json import quantization_config

V = TypeVar("V")


@dataclass(frozen=True)
class Calibrated:
    """What a calibration brings to a compression.

    Attributes:
        moments: second moments, which workers read; None where specs measure errors by weights.
        fingerprint: of model, text and tokens.
        about: what stands in swsc_calibration.json: the text's name and traces, so that an evaluation can refuse it.
        ids: int64 [windows, length], the tokens.
        cache: directory that all nodes see, where work in progress is kept.
    """

    hessians: Hessians | None
    fingerprint: str
    about: dict[str, Any]
    ids: np.ndarray
    cache: str

    @property
    def words(self) -> str:
        """What a card says of it: the text by its name, without the path to it."""
        text = os.path.basename(self.about["text"]) if self.about["text"] else "text that the model wrote itself"
        return f"{len(self.ids)} windows of {self.ids.shape[1]} tokens of {text}"


@dataclass(frozen=True)
class TunedModel:
    """A compressed model that was tuned, in place of matrices yet to be compressed.

    Attributes:
        tuned: what workers read.
        rows: tensor -> its row in the report before.
        about: what the report says of the tuning.
    """

    tuned: TunedValues
    rows: dict[str, CompressedRow]
    about: dict[str, Any]


def compress_model(
    source: Checkpoint, plan: Plan, output: str, settings: CompressSettings, arithmetic: Arithmetic, pools: Pools,
    calibrated: Calibrated | None = None, tune: Callable[[], TunedModel] | None = None,
    overwrite: bool = False, on_wait: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carry out `plan` into the directory `output`; returns the report that stands in swsc_report.json.

    `arithmetic` is part of what makes two runs the same: the last bit depends on it.

    `calibrated` is needed where the plan's specs measure errors by activations. `tune`, called when it turns out that there
    is anything to do, gives the matrices ready made, but for their values.

    A directory that an interrupted run of the same settings left is gone on with; one that is complete is left alone; one of
    other settings is replaced if `overwrite` says so. If another run is at work there, `on_wait` is told and it is waited for.

    Raises:
        OutputError: the directory holds something else, another run writes there, or the disk has not enough room.
        CheckpointError: a selected weight holds NaN or Inf; nothing is left behind.
        RunError: tasks failed; what is finished is kept, and the same call goes on from there.
    """
    started = time.perf_counter()
    store = Store.at(output)
    require_unmixed(source, store)
    identity = {
        **identity_of(source, settings, arithmetic),
        CALIBRATION_KEY: calibrated.fingerprint if calibrated else None,
    }
    names, nbytes = names_of(source, plan), plan.stored_bytes_as(settings.format)
    with begin_with_room(store, source, identity, names, nbytes, overwrite, on_wait) as out:
        if out.complete:
            Ingredients(source, calibrated.hessians if calibrated else None).require_made_of(store)
            return {**store.read_json("swsc_report.json"), "resumed": "complete"}
        return _carry_out(out, source, plan, settings, pools, calibrated, tune, started, arithmetic)


def _carry_out(
    out: Output, source: Checkpoint, plan: Plan, settings: CompressSettings, pools: Pools,
    calibrated: Calibrated | None, tune: Callable[[], TunedModel] | None, started: float, arithmetic: Arithmetic,
) -> dict[str, Any]:  # fmt: skip
    hessians = calibrated.hessians if calibrated else None
    ready = _tuned(tune, out) if tune else None
    ingredients = Ingredients(source, hessians, ready.tuned if ready else None)
    out = ingredients.kept(out)
    records = {file: record for file, (record, _) in out.finished.items()}
    results = {row["name"]: MatrixResult.from_json(row) for _, found in out.finished.values() for row in found}
    peaks: dict[str, int] = {}
    kernels: set[str] = set()

    def note(done: TaskResult[LayerReport | FileRecord]) -> None:
        layer, record = (None, done.value) if isinstance(done.value, FileRecord) else (done.value, done.record)
        assert record is not None  # of a layer, which was committed
        ingredients.require_calibrated_on(record.tensors, [one.row for one in layer.results] if layer else ())
        records[record.name] = record
        if layer:
            results.update({one.row.name: one for one in layer.results})
            kernels.add(layer.kernels)
            peaks[str(done.worker)] = max(layer.peak_rss, peaks.get(str(done.worker), 0))

    tasks = [
        task for task in _tasks(source, plan, out.ticket, settings, hessians, ready) if task.key not in out.finished
    ]
    stage = Stage("compress", compression_bytes(plan), 0 if ready else device_bytes(plan), "files")
    run_output_stage(pools, stage, tasks, note, out)
    rows = {name: one.row for name, one in results.items()}
    report = build_report(plan, rows, time.perf_counter() - started, peaks, settings.format)
    report["left_out"] = dict(source.left_out)
    report["arithmetic"] = {**arithmetic.identity, "kernels": sorted(kernels)}
    if source.dequantized:
        report["dequantized_from"] = vars(source.dequantized)
    report["files_of_an_earlier_run"] = len(out.finished)
    if known := digests_of_source(source):
        report[VERIFIED] = known.name
    if ready:
        report["tuning"] = ready.about
    ordered = [records[name] for name in sorted(records)]
    if calibrated:
        ordered.append(out.store.write_json(CALIBRATION, calibrated.about))
    card = card_of_compression(source, plan, results.values(), settings, calibrated.words if calibrated else "")
    finish(out, source, ordered, _config(source, results, settings.format), report, card)
    return report


def _tuned(tune: Callable[[], TunedModel], out: Output) -> TunedModel:
    """What tuning makes; the begun output is taken back for a mistake that only shows there."""
    try:
        return tune()
    except UserError:
        abandon(out)
        raise


def _tasks(
    source: Checkpoint, plan: Plan, ticket: Ticket, settings: CompressSettings, hessians: Hessians | None,
    ready: TunedModel | None,
) -> list[Task[LayerReport | FileRecord]]:  # fmt: skip
    tasks: list[Task[Any]] = []
    for layer in plan.layers:
        job: Job[LayerReport]
        if ready:
            before = {info.name: ready.rows[info.name] for info, _ in layer.items}
            job = ApplyTuning(source.store, layer, settings.format, ready.tuned, before)
        else:
            job = CompressLayer(source.store, layer, settings.format, settings.seed, settings.storage_dtype, hessians)
        where = Destination(ticket, layer.file)
        tasks.append(Task(layer.file, job, layer.layer, outputs=1, commit_to=where, weight=layer.nbytes))
    return tasks + [copy_task(source.store, copy, ticket) for copy in plan.copies]


def _config(source: Checkpoint, results: Mapping[str, MatrixResult], form: str) -> ModelConfig:
    if form == "dense":
        return source.config
    entries = {name: results[name].entry for name in sorted(results)}
    return {**source.config, "quantization_config": quantization_config(entries)}
