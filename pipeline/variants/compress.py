"""The compression stage: an open checkpoint and its plan in, the complete directory of a compressed model out."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.compression.job import CompressLayer, LayerReport, copy_task
from pipeline.device import Arithmetic
from pipeline.engine.stage import Stage, log_and_release
from pipeline.engine.task import Destination, Job, Task
from pipeline.errors import UserError
from pipeline.outputs.card_content import card_of_compression
from pipeline.outputs.owned_files import REPORT
from pipeline.outputs.preflight import begin_with_room, names_of, require_unmixed
from pipeline.outputs.report import CompressionReport
from pipeline.outputs.stage import check_on, run_output_stage
from pipeline.outputs.transaction import CALIBRATION, Output, OutputRequest, abandon, finish
from pipeline.planning.memory import WORKER_BASE, copying_memory, layer_compression_memory
from pipeline.planning.plan import Plan
from pipeline.planning.tasks import LayerTask
from pipeline.planning.time_model import copying_seconds, layer_seconds, restoring_seconds
from pipeline.storage.lease import Ticket
from pipeline.storage.store import Store
from pipeline.tuning.job import ApplyTuning
from pipeline.variants.compression import Compression, Compute, Target, TunedModel
from pipeline.variants.output_inputs import OutputInputs
from pipeline.variants.written_files import WrittenFiles
from swsc_core.compressed.config_json import quantization_config

Tune = Callable[[], TunedModel]
# Bytes that workers on GPUs copy beside their compressions.
_COPIED_BESIDE = 16 << 30


def compress_model(
    compression: Compression, target: Target, compute: Compute, tune: Tune | None = None
) -> dict[str, object]:
    """Carry out a plan into the target directory.

    The directory of an interrupted run of equal identity is resumed. A complete output of equal identity stays as it
    is.

    Args:
        compression: `compression.calibrated` is required if specs of the plan weight errors by activations.
        tune: returns the tuned values of the compressed model; it is called unless the output is complete already.

    Returns:
        The report, as swsc_report.json holds it. The report of an output that was complete has the key "resumed", too.

    Raises:
        OutputError: the directory holds something else, another run writes there, or the disk has not enough room.
        CheckpointError: a selected weight holds NaN or Inf; the begun output is removed.
        RunError: tasks failed; finished files are kept, and the same call resumes.
    """
    started = time.perf_counter()
    store = Store.at(target.location)
    require_unmixed(compression.source, store)
    with _begin(compression, target, compute) as output:
        if output.complete:
            OutputInputs(compression.source, compression.hessians).require_inputs_of(store)
            return {**store.read_json(REPORT), "resumed": "complete"}
        tuned = _tuned(tune, output) if tune else None
        inputs = OutputInputs(compression.source, compression.hessians, tuned.tuned if tuned else None)
        output = inputs.without_other_inputs(output, compression.plan.matrices_by_file)
        files = WrittenFiles(inputs, output.finished)
        _write_files(compression, output, files, tuned, compute)
        report = _report(compression, files, time.perf_counter() - started, compute.arithmetic)
        report |= {"tuning": tuned.summary} if tuned else {}
        _commit(compression, output, files, report)
        return report


def _begin(compression: Compression, target: Target, compute: Compute) -> Output:
    source, plan = compression.source, compression.plan
    identity = compression.identity(compute.arithmetic)
    store, names, check = Store.at(target.location), names_of(source, plan), check_on(compute.pools)
    request = OutputRequest(store, identity, names, target.overwrite, check=check)
    nbytes = plan.stored_bytes_as(compression.settings.format)
    return begin_with_room(request, source, nbytes, log_and_release(compute.pools) if target.waits else None)


def _tuned(tune: Tune, output: Output) -> TunedModel:
    """The tuned values. A user's mistake that only tuning finds removes the begun output."""
    try:
        return tune()
    except UserError:
        abandon(output)
        raise


def _write_files(
    compression: Compression, output: Output, files: WrittenFiles, tuned: TunedModel | None, compute: Compute
) -> None:
    """Run the tasks of all files that are not finished."""
    plan, source = compression.plan, compression.source.store
    layers = _layer_tasks(compression, output.ticket, tuned)
    copies: list[Task[Any]] = [copy_task(source, copy, output.ticket) for copy in plan.copies]
    memory = layer_compression_memory(plan)
    # Tuned values are applied on the CPU.
    memory = replace(memory, device=WORKER_BASE.device) if tuned else memory
    compressing = Stage("compress", memory, "files")
    copying = Stage("copy", copying_memory(plan), unit="files", on_cpu=True)
    separately = _are_copied_separately(plan, compute.arithmetic)
    stages = [(compressing, layers), (copying, copies)] if separately else [(compressing, layers + copies)]
    for stage, tasks in stages:
        unfinished = [task for task in tasks if task.key not in output.finished]
        run_output_stage(compute.pools, stage, unfinished, files.add, output)


def _are_copied_separately(plan: Plan, arithmetic: Arithmetic) -> bool:
    """Whether copies have a stage of their own, on workers without a GPU, so that they occupy none.

    Few bytes are copied together with the compression, because starting other workers takes longer.
    """
    return arithmetic.device != "cpu" and sum(copy.nbytes for copy in plan.copies) > _COPIED_BESIDE


def _layer_tasks(compression: Compression, ticket: Ticket, tuned: TunedModel | None) -> list[Task[Any]]:
    tasks: list[Task[Any]] = []
    for layer in compression.plan.layers:
        job, work = _layer_job(compression, layer, tuned)
        task = Task(layer.file, job, layer.layer, outputs=1, commit_to=Destination(ticket, layer.file))
        tasks.append(replace(task, work=work + copying_seconds(layer.nbytes), nbytes=layer.nbytes))
    return tasks


def _layer_job(compression: Compression, layer: LayerTask, tuned: TunedModel | None) -> tuple[Job[LayerReport], float]:
    """The job that writes a layer, and its estimated work besides reading and writing."""
    store, settings = compression.source.store, compression.settings
    if tuned:
        rows = {info.name: tuned.rows[info.name] for info, _ in layer.items}
        work = restoring_seconds(sum(info.count for info, _ in layer.items))
        return ApplyTuning(store, layer, settings.format, tuned.tuned, rows), work
    hessians = compression.hessians.of(info.name for info, _ in layer.items) if compression.hessians else None
    job = CompressLayer(store, layer, settings.format, settings.seed, settings.storage_dtype, hessians)
    return job, layer_seconds(layer)


def _report(compression: Compression, files: WrittenFiles, seconds: float, arithmetic: Arithmetic) -> dict[str, object]:
    source = compression.source
    digests = digests_of_source(source)
    return CompressionReport(
        plan=compression.plan,
        rows={name: result.row for name, result in files.results.items()},
        form=compression.settings.format,
        seconds=seconds,
        peak_rss=files.peak_rss,
        left_out=dict(source.ignored_files),
        arithmetic={**arithmetic.identity, "kernels": sorted(files.kernels)},
        files_of_an_earlier_run=files.earlier,
        dequantized_from=vars(source.dequantized) if source.dequantized else None,
        verified_source=digests.name if digests else None,
    ).to_json()


def _commit(compression: Compression, output: Output, files: WrittenFiles, report: dict[str, object]) -> None:
    """Write the files beside the tensors; the manifest, which makes the output complete, last."""
    source, settings, calibrated = compression.source, compression.settings, compression.calibrated
    records = [files.records[name] for name in sorted(files.records)]
    if calibrated:
        records.append(output.store.write_json(CALIBRATION, vars(calibrated.record)))
    description = calibrated.description if calibrated else ""
    card = card_of_compression(source, compression.plan, files.results.values(), settings, description)
    config = source.config
    if settings.format == "swsc":
        entries = {name: files.results[name].entry for name in sorted(files.results)}
        config = {**config, "quantization_config": quantization_config(entries)}
    finish(output, source, records, config, report, card)
