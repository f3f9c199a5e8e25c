"""Many models × many variants × many texts in one driver over one pool of workers.

Work is cut into units: one tensor of one model compressed in one way. Variants share units (Q at 3 bits is the same in
"Q" and in "Q and K"), a tensor is read once for all its units, and a variant's evaluation begins as soon as its units are
there: a worker keeps the base model and swaps them in from the object store. No variant is written as a model.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from pipeline.config import EvaluateSettings, SweepSettings, Variant
from pipeline.errors import ConfigError, UserError
from pipeline.flows.compress import PoolMaker, whole_bits
from pipeline.flows.evaluate import deal, model_key, result
from pipeline.measure.windows import Windows, make_windows
from pipeline.model.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from pipeline.model.plan import Plan, make_plan
from pipeline.run.driver import execute
from pipeline.run.pool import Done, Task
from pipeline.run.progress import Progress
from swsc_core.spec import Spec

UNCOMPRESSED = "uncompressed"
Way = tuple[tuple[Spec, ...], int, str | None]  # specs, seed, storage dtype
Unit = tuple[int, str, Way]  # model, tensor, way


@dataclass
class _Run:
    """One model × one variant: what it needs, and what has been measured of it."""

    model: int
    variant: Variant | None  # None: the model as it is
    plan: Plan | None
    units: dict[str, Unit] = field(default_factory=dict)  # tensor -> unit
    missing: set[Unit] = field(default_factory=set)
    parts: list[Task] = field(default_factory=list)  # evaluation tasks not yet given out
    outstanding: int = 0  # evaluation tasks not yet done
    losses: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (evaluation, first window)
    dtype: str = ""
    seconds: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        return self.variant.name if self.variant else UNCOMPRESSED


@dataclass(frozen=True)
class SweepResult:
    """Rows for people and files: one a variant × evaluation, and one a variant × tensor."""

    rows: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    seconds: float

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["error"]]


def run_sweep(settings: SweepSettings, make_pool: PoolMaker) -> SweepResult:
    """Run a whole sweep.

    Raises:
        ConfigError: everything in the settings that does not fit the models, at once; before any work.
        CheckpointError, TextError: a model or a text cannot be opened.
    """
    started = time.perf_counter()
    source = _SweepSource(settings)
    tasks = source.total_tasks
    pool = make_pool(tasks)
    try:
        with Progress("sweep", tasks, 0) as progress:
            execute(pool, source, progress)
    finally:
        pool.close()
    rows, tensors = source.rows()
    return SweepResult(rows, tensors, time.perf_counter() - started)


class _SweepSource:
    """Deals out compressions and evaluations, and gathers what comes back."""

    def __init__(self, settings: SweepSettings) -> None:
        self._settings = settings
        if not settings.models:
            raise ConfigError("models: none given; name them in the file or by --model")
        self._checkpoints = [open_checkpoint(location) for location in settings.models]
        self._windows = [
            [make_windows(location, text) for text in settings.evaluations] for location in settings.models
        ]
        self._runs = self._make_runs()
        self._compressions = self._make_compressions()[::-1]
        self._payloads: dict[Unit, Any] = {}
        self._rows: dict[Unit, dict[str, Any]] = {}
        self._loaded: dict[int, _Run] = {}  # worker -> the run that it measured last
        for run in self._runs:
            self._open_if_ready(run)

    @property
    def total_tasks(self) -> int:
        parts = sum(len(deal(w.ids, e)) for run in self._runs for w, e in self._measurements(run))
        return len(self._compressions) + parts

    def _measurements(self, run: _Run) -> list[tuple[Windows, EvaluateSettings]]:
        return list(zip(self._windows[run.model], self._settings.evaluations, strict=True))

    def _make_runs(self) -> list[_Run]:
        runs, wrong = [], []
        for model, checkpoint in enumerate(self._checkpoints):
            if self._settings.uncompressed and self._settings.evaluations:
                runs.append(_Run(model, None, None))
            for variant in self._settings.variants:
                try:
                    plan = make_plan(checkpoint, variant)
                except UserError as error:
                    wrong.append(f"variant {variant.name}: {error}")
                    continue
                runs.append(_new_run(model, variant, plan))
        if wrong:
            raise ConfigError("; ".join(wrong))
        return runs

    def _make_compressions(self) -> list[Task]:
        """A task a tensor, for all its units; largest first within a model, models in turn."""
        per_model = [self._compressions_of(model, checkpoint) for model, checkpoint in enumerate(self._checkpoints)]
        return [task for task in chain.from_iterable(zip_longest(*per_model)) if task is not None]

    def _compressions_of(self, model: int, checkpoint: Checkpoint) -> list[Task]:
        units: dict[str, list[Unit]] = {}
        for run in self._runs:
            for tensor, unit in run.units.items():
                if run.model == model and unit not in units.setdefault(tensor, []):
                    units[tensor].append(unit)
        infos: list[TensorInfo] = sorted((checkpoint.tensors[name] for name in units), key=lambda info: -info.nbytes)
        return [
            Task(
                ("compress", tuple(units[info.name])), "compress_units",
                (checkpoint.store, info, [way for _, _, way in units[info.name]]),
                label=f"{self._settings.models[model]} {info.name}", outputs=len(units[info.name]),
            )
            for info in infos
        ]  # fmt: skip

    def _open_if_ready(self, run: _Run) -> None:
        """Make a run's evaluation tasks once its last unit is there."""
        if run.missing or run.error:
            return
        names = tuple(run.units)
        payloads = tuple(self._payloads[unit] for unit in run.units.values())
        checkpoint = self._checkpoints[run.model]
        for number, (windows, text) in enumerate(self._measurements(run)):
            arguments = (model_key(checkpoint, text), run.name if run.variant else "", names)
            run.parts += [
                Task(
                    ("measure", id(run), number, start), "measure", (*arguments, part), payloads=payloads,
                    label=f"{run.name} on {self._settings.models[run.model]}, window {start}",
                )
                for start, part in deal(windows.ids, text)
            ]  # fmt: skip
        run.outstanding = len(run.parts)
        run.parts.reverse()
        if not run.parts:
            self._release(run)

    def next(self, worker: int) -> Task | None:
        """Evaluations first, so that payloads go soon; a worker stays with its variant, then with its model."""
        before = self._loaded.get(worker)
        if before and before.parts:
            return before.parts.pop()
        ready = [run for run in self._runs if run.parts]
        if ready:
            at_work = Counter(run.model for other, run in self._loaded.items() if other != worker)
            run = min(ready, key=lambda run: (before is None or run.model != before.model, at_work[run.model]))
            self._loaded[worker] = run
            return run.parts.pop()
        return self._compressions.pop() if self._compressions else None

    def done(self, done: Done) -> None:
        """Take the result of a task in."""
        if done.task.method == "compress_units":
            self._compressed(done)
        else:
            self._measured(done)

    def _compressed(self, done: Done) -> None:
        _, units = done.task.key  # type: ignore[misc]
        for number, unit in enumerate(units):
            error = str(done.error) if done.error else done.value["rows"][number].get("error")
            if not error:
                self._rows[unit] = done.value["rows"][number]
                self._payloads[unit] = done.payloads[number]
            for run in self._runs:
                if unit in run.missing:
                    run.missing.discard(unit)
                    run.error = run.error or error
                    self._open_if_ready(run)
            self._forget_unused(unit)

    def _measured(self, done: Done) -> None:
        _, identity, number, start = done.task.key  # type: ignore[misc]
        run = next(run for run in self._runs if id(run) == identity)
        run.outstanding -= 1
        if done.error:
            run.error = run.error or str(done.error)
            run.outstanding -= len(run.parts)
            run.parts.clear()
        else:
            run.losses[number, start] = done.value["losses"]
            run.dtype = done.value["dtype"]
        if run.outstanding == 0:
            self._release(run)

    def _release(self, run: _Run) -> None:
        """A run is over: let payloads go that no other run waits for."""
        units, run.units = list(run.units.values()), {}
        for unit in units:
            self._forget_unused(unit)

    def _forget_unused(self, unit: Unit) -> None:
        if not any(unit in run.units.values() and not run.error for run in self._runs):
            self._payloads.pop(unit, None)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows a variant × evaluation, and rows a variant × tensor."""
        rows, tensors = [], []
        for run in self._runs:
            model = self._settings.models[run.model]
            about = {"model": model, "variant": run.name}
            found = self._tensor_rows(run)
            tensors += [{**about, **row} for row in found.values()]
            about |= _bits(run, found) if run.variant else _own_bits(self._checkpoints[run.model])
            about["reference"] = self._reference(run)
            measured = [self._result(run, number) for number in range(len(self._settings.evaluations))]
            rows += [{**about, **one} for one in measured or [{"error": run.error}]]
        return rows, tensors

    def _tensor_rows(self, run: _Run) -> dict[str, dict[str, Any]]:
        if not run.plan or not run.variant:
            return {}
        units = _units(run.model, run.variant, run.plan)
        return {name: self._rows[unit] for name, unit in units.items() if unit in self._rows}

    def _result(self, run: _Run, number: int) -> dict[str, Any]:
        text, windows = self._settings.evaluations[number], self._windows[run.model][number]
        losses = [loss for part in sorted(p for p in run.losses if p[0] == number) for loss in run.losses[part]]
        about: dict[str, Any] = {
            "text": text.text,
            "seqlen": text.seqlen,
            "windows": len(windows.ids),
            "error": run.error,
        }
        if run.error:
            return {**about, "perplexity": None}
        try:
            return {**about, **result(self._settings.models[run.model], losses, windows, text, run.dtype)}
        except Exception as error:
            return {**about, "perplexity": None, "error": str(error)}

    def _reference(self, run: _Run) -> float | None:
        """The published perplexity of this row, if the model is one that it was published for."""
        published = run.variant.reference if run.variant else self._settings.reference
        return published.get(known_model(self._checkpoints[run.model].config) or "")


def _new_run(model: int, variant: Variant, plan: Plan) -> _Run:
    units = _units(model, variant, plan)
    return _Run(model, variant, plan, units, set(units.values()))


def _units(model: int, variant: Variant, plan: Plan) -> dict[str, Unit]:
    return {
        decision.info.name: (model, decision.info.name, (decision.specs, variant.seed, variant.storage_dtype))
        for decision in plan.compressed
    }


def _own_bits(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bits a weight of a model as it is."""
    return {"whole_model_bits_per_weight": 8 * checkpoint.nbytes / checkpoint.weights, "relative_error": 0.0}


def _bits(run: _Run, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not run.plan or not rows or len(rows) < len(run.plan.compressed):
        return {
            "paper_bits": None,
            "bits_per_weight": None,
            "whole_model_bits_per_weight": None,
            "relative_error": None,
        }
    counts = {decision.info.name: decision.info.count for decision in run.plan.compressed}
    whole = whole_bits(run.plan, rows)
    return {
        "method": run.variant.method if run.variant else None,
        "paper_bits": sum(rows[name]["paper_bits"] * count for name, count in counts.items()) / sum(counts.values()),
        "bits_per_weight": whole["compressed_bits_per_weight"],
        "whole_model_bits_per_weight": whole["whole_model_bits_per_weight"],
        "relative_error": sum(rows[name]["mean_squared_error"] * count for name, count in counts.items())
        / sum(rows[name]["mean_square"] * count for name, count in counts.items()),
    }


def known_model(config: dict[str, Any]) -> str | None:
    """Name of a model that published figures are compared with, told by its shape."""
    shape = tuple(
        config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    return "Llama-2-7B" if shape == ("llama", 4096, 32, 11008, 32000) else None
