"""Many models × many variants × many texts in one driver over one pool of workers.

A tensor is read once for all the ways in which it is compressed (the units of sweep_runs.py). A variant's evaluation
begins as soon as its units are there: a worker keeps the base model and swaps them in from the object store. No variant is
written as a model.
"""

import time
from collections import Counter
from contextlib import ExitStack
from itertools import chain, zip_longest
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.compression.job import CompressionFailure, CompressVariants
from pipeline.console import log_prefix
from pipeline.device import Arithmetic
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import ConfigError, DiskFull, PayloadLost
from pipeline.evaluation.flow import batch_parts, evaluator_bytes, evaluator_device_bytes, model_key
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.models.matrices import find_matrix
from pipeline.models.stored_model import Model
from pipeline.outputs.report_rows import MatrixResult
from pipeline.planning.cost_model import WORKER_BASE, compression_bytes, device_bytes
from pipeline.planning.plan import Plan
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.sweep import SweepSettings, Variant
from pipeline.sweep.cache import forget_measured, require_cache_room, shares_its_stages
from pipeline.sweep.rows import SweepResult, run_rows, tensor_rows, tensor_table
from pipeline.sweep.runs import Run, Unit, make_runs, open_models, open_windows
from pipeline.texts.windows import Windows
from pipeline.variants.calibrate_and_allocate import prepare
from pipeline.variants.compress import Calibrated
from pipeline.variants.compress_and_tune import forget_stages, produce_variant

_BEGUN_AGAIN = 2  # most times that a run's lost units are made again


class Sweep:
    """Deals out compressions and evaluations, and gathers what comes back."""

    def __init__(self, settings: SweepSettings) -> None:
        """Open models and texts and plan every variant.

        Raises:
            ConfigError: everything in the settings that does not fit the models, at once.
            CheckpointError, TextError: a model or a text cannot be opened.
        """
        self._started = time.perf_counter()
        self._settings = settings
        if not settings.models:
            raise ConfigError("models: none given; name them in the file or by --model")
        self._checkpoints = open_models(settings)
        self._windows = open_windows(settings, self._checkpoints)
        self._runs = make_runs(settings, self._checkpoints)
        self._compressions = self._make_compressions()[::-1]
        self._payloads: dict[Unit, Any] = {}
        self._results: dict[Unit, MatrixResult] = {}
        self._kept = ExitStack()  # tuned models in the cache, which another sweep may be done with before
        self._loaded: dict[int, Run] = {}  # worker -> the run that it measured last

    def calibrate(self, pools: Pools, beside: str, arithmetic: Arithmetic) -> None:
        """Give variants that measure errors by activations their moments and final specs; make those that are tuned.

        Raises:
            TextError: the calibration text is too short, or shares passages with a text that is measured on.
        """
        require_cache_room(self._runs, self._settings, beside)
        for number, run in enumerate(self._runs):
            if run.plan is None or run.variant is None or not run.variant.needs_calibration:
                continue
            with log_prefix(f"{self._settings.models[run.model]}, {run.name}"):
                made = self._prepare(run, run.variant, run.plan, pools, beside, arithmetic)
                if made and run.made:
                    settings, shared = (
                        self._settings.calibration_of(run.variant),
                        shares_its_stages(run, self._runs[number + 1 :]),
                    )
                    forget_stages(self._checkpoints[run.model], run.variant, settings, made, arithmetic, shared)
            run.hessians = made.hessians if made else None
            run.begin()
        self._compressions = self._make_compressions()[::-1]

    def _prepare(
        self, run: Run, variant: Variant, plan: Plan, pools: Pools, beside: str, arithmetic: Arithmetic
    ) -> Calibrated | None:
        """Final specs of a run, and the model itself where its matrices are tuned together."""
        source, settings = self._checkpoints[run.model], self._settings.calibration_of(variant)
        run.plan, made = prepare(source, plan, variant, settings, beside, pools, arithmetic, self._settings.evaluations)
        if made and variant.epochs:
            run.made = produce_variant(source, run.plan, variant, settings, made, arithmetic, pools, self._kept)
        return made

    def forget_measured(self) -> None:
        """Remove tuned models from the cache once their rows are written, unless they are to be kept."""
        self.close()
        if not self._settings.keep_tuned:
            forget_measured(self._runs)

    def close(self) -> None:
        """Let other runs remove tuned models that this one has used."""
        self._kept.close()

    def run(self, pool: Pool) -> None:
        """Do all of it and let the workers go. Whatever stops it, `result` has what was measured until then."""
        for run in self._runs:
            self._open_if_ready(run)
        try:
            with Progress("sweep", self.total_tasks, 0) as self._progress:
                execute(pool, self, self._progress)
        except BaseException:
            for run in self._runs:
                run.error = run.error or ("not finished" if run.missing or run.outstanding else None)
            raise
        finally:
            pool.close()

    @property
    def total_tasks(self) -> int:
        parts = sum(len(batch_parts(w.ids, e)) for run in self._runs for w, e in self._measurements(run))
        return len(self._compressions) + parts

    @property
    def stage(self) -> Stage:
        """The stage that does all of it."""
        return Stage("sweep", self.worker_bytes, self.device_bytes, keeps_model=True)

    @property
    def worker_bytes(self) -> int:
        """Peak memory of a worker: it may hold an evaluation model while it compresses."""
        plans = [run.plan for run in self._runs if run.plan]
        compressing = max(compression_bytes(plan) for plan in plans)
        models = [Model(checkpoint, {}) for checkpoint in self._checkpoints]
        measuring = [evaluator_bytes(model, text) for model in models for text in self._settings.evaluations]
        return compressing + max(measuring, default=WORKER_BASE) - WORKER_BASE

    @property
    def device_bytes(self) -> int:
        """What of it lies on a GPU, if the worker has one."""
        compressing = max(device_bytes(run.plan) for run in self._runs if run.plan)
        models = [Model(checkpoint, {}) for checkpoint in self._checkpoints]
        measuring = [evaluator_device_bytes(model, text) for model in models for text in self._settings.evaluations]
        return compressing + max(measuring, default=0)

    def _measurements(self, run: Run) -> list[tuple[Windows, EvaluateSettings]]:
        return list(zip(self._windows[run.model], self._settings.evaluations, strict=True))

    def _make_compressions(self) -> list[Task[Any]]:
        """A task a tensor, for all its units; models in turn."""
        per_model = [self._compressions_of(model, checkpoint) for model, checkpoint in enumerate(self._checkpoints)]
        return [task for task in chain.from_iterable(zip_longest(*per_model)) if task is not None]

    def _compressions_of(self, model: int, checkpoint: Checkpoint) -> list[Task[Any]]:
        units: dict[str, list[Unit]] = {}
        for run in self._runs:
            for tensor, unit in run.units.items():
                if run.model == model and unit not in units.setdefault(tensor, []):
                    units[tensor].append(unit)
        # In the order in which runs need them, so that the first variants can be measured while others still compress.
        needed_by = {name: next(i for i, run in enumerate(self._runs) if name in run.units) for name in units}
        order = sorted(units, key=lambda name: (needed_by[name], -find_matrix(checkpoint, name).nbytes))
        return [self._compression(model, find_matrix(checkpoint, name), units[name]) for name in order]

    def _compression(self, model: int, info: MatrixInfo, units: list[Unit]) -> Task[Any]:
        return Task(
            ("compress", tuple(units)),
            CompressVariants(self._checkpoints[model].store, info, tuple(variant for _, _, variant in units)),
            f"{self._settings.models[model]} {info.name}", outputs=len(units),
        )  # fmt: skip

    def _open_if_ready(self, run: Run) -> None:
        """Make a run's evaluation tasks once its last unit is there."""
        if run.missing or run.error:
            return
        names = tuple(run.units)
        payloads = tuple(self._payloads[unit] for unit in run.units.values())
        checkpoint = run.made.checkpoint if run.made else self._checkpoints[run.model]
        for number, (windows, text) in enumerate(self._measurements(run)):
            key, variant = model_key(checkpoint, text), run.name if names else ""
            run.parts += [
                Task(
                    ("measure", id(run), number, start), MeasureLosses(key, part, variant, names), payloads=payloads,
                    label=f"{run.name} on {self._settings.models[run.model]}, window {start}",
                )
                for start, part in batch_parts(windows.ids, text)
                if (number, start) not in run.losses
            ]  # fmt: skip
        run.outstanding = len(run.parts)
        run.parts.reverse()
        if not run.parts:
            self._release(run)

    def next(self, worker: int) -> Task[Any] | None:
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

    def done(self, done: TaskResult[Any]) -> None:
        """Take the result of a task in.

        Raises:
            DiskFull: a node's disk takes nothing more: no other run would fare better.
        """
        if isinstance(done.error, DiskFull):
            raise done.error
        if isinstance(done.task.job, CompressVariants):
            self._compressed(done)
        else:
            self._measured(done)

    def _compressed(self, done: TaskResult[Any]) -> None:
        _, units = done.task.key
        for number, unit in enumerate(units):
            result = CompressionFailure(unit[1], str(done.error)) if done.error else done.value[number]
            error = result.error if isinstance(result, CompressionFailure) else None
            if isinstance(result, MatrixResult):
                self._results[unit] = result
                self._payloads[unit] = done.payloads[number]
            for run in self._runs:
                if unit in run.missing:
                    run.missing.discard(unit)
                    if error and not run.error:
                        run.error = error
                        self._release(run)
                    self._open_if_ready(run)
            self._forget_unused(unit)

    def _measured(self, done: TaskResult[Any]) -> None:
        _, identity, number, start = done.task.key
        run = next(run for run in self._runs if id(run) == identity)
        run.outstanding -= 1
        if isinstance(done.error, PayloadLost) and run.begun_again < _BEGUN_AGAIN:
            run.lost = str(done.error)
            self._progress.add(1)
            run.outstanding -= len(run.parts)
            run.parts.clear()
        elif done.error:
            run.error = run.error or str(done.error)
            run.outstanding -= len(run.parts)
            run.parts.clear()
        else:
            measured: WindowLosses = done.value
            run.losses[number, start], run.dtypes[number] = measured.losses, measured.dtype
        if run.outstanding == 0 and run.lost and not run.error:
            self._make_again(run)
        elif run.outstanding == 0:
            self._release(run)

    def _make_again(self, run: Run) -> None:
        """Have all units of a run compressed again, some of which were lost with a node; what was measured stays."""
        self._progress.log(f"{run.lost}; the matrices of {run.name} are compressed again")
        run.lost, run.begun_again = None, run.begun_again + 1
        checkpoint = self._checkpoints[run.model]
        for tensor, unit in run.units.items():
            if unit not in run.missing:
                run.missing.add(unit)
                self._compressions.append(self._compression(run.model, find_matrix(checkpoint, tensor), [unit]))
                self._progress.add(1)

    def _release(self, run: Run) -> None:
        """A run is over: let payloads go that no other run waits for."""
        units, run.units = list(run.units.values()), {}
        for unit in units:
            self._forget_unused(unit)

    def _forget_unused(self, unit: Unit) -> None:
        if not any(unit in run.units.values() and not run.error for run in self._runs):
            self._payloads.pop(unit, None)

    def result(self) -> SweepResult:
        """What has been measured so far."""
        rows, tensors = [], []
        for run in self._runs:
            found = tensor_rows(run, self._results)
            rows += run_rows(run, self._settings, self._checkpoints[run.model], self._windows[run.model], found)
            labels = {"model": self._settings.models[run.model], "variant": run.name}
            tensors += [labels | row for row in tensor_table(run, self._results)]
        return SweepResult(rows, tensors, time.perf_counter() - self._started)
