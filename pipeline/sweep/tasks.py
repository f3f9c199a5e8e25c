"""The task source of a sweep: compressions of matrices, and evaluations as soon as a run's matrices are compressed.

A matrix is read once for all units that compress it. Compressed matrices stay in the object store until no run needs
them; a worker keeps the base model loaded and replaces its matrices. No variant is written as a model.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.compression.job import CompressionFailure, CompressVariants
from pipeline.engine.progress import Progress
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import DiskFull, PayloadLost, SwscError
from pipeline.evaluation.flow import batch_parts, model_key
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.models.matrices import find_matrix
from pipeline.outputs.report_rows import MatrixResult
from pipeline.planning.time_model import forward_seconds, matrix_seconds
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run, Unit

_MAX_RECOMPUTATIONS = 2  # of the units of a run that were lost with a node


class EvaluationKey(NamedTuple):
    """Key of an evaluation task: number of the run, number of the evaluation, and first window."""

    run: int
    evaluation: int
    first_window: int


class SweepTasks:
    """Hands out the tasks of a sweep and collects their results.

    Attributes:
        results: unit -> report row and entry of the compressed matrix.
        payloads: unit -> handle of the compressed matrix in the object store.
    """

    def __init__(
        self, inputs: SweepInputs, runs: Sequence[Run], progress: Progress, in_blocks: Collection[int] = ()
    ) -> None:
        """Create the tasks.

        Args:
            inputs: models and texts.
            runs: the runs.
            progress: receives the number of repeated tasks.
            in_blocks: numbers of the runs that are evaluated in blocks (`VariantPasses`) once this source is empty.
        """
        self._inputs, self._runs, self._progress = inputs, runs, progress
        self._in_blocks = frozenset(in_blocks)
        self.results: dict[Unit, MatrixResult] = {}
        self.payloads: dict[Unit, Any] = {}
        self._compressions = compression_tasks(inputs, runs)[::-1]
        self._last_run: dict[int, Run] = {}  # worker -> run of its last evaluation task
        for run in runs:
            self._open_if_ready(run)

    def next(self, worker: int) -> Task[Any] | None:
        """Evaluations come first, so that payloads are released early; a worker keeps its variant, then its model."""
        last = self._last_run.get(worker)
        if last and last.measurement.tasks:
            return last.measurement.tasks.pop()
        ready = [run for run in self._runs if run.measurement.tasks]
        if not ready:
            return self._compressions.pop() if self._compressions else None
        workers = Counter(run.model for other, run in self._last_run.items() if other != worker)
        run = min(ready, key=lambda run: (last is None or run.model != last.model, workers[run.model]))
        self._last_run[worker] = run
        return run.measurement.tasks.pop()

    def done(self, done: TaskResult[Any]) -> None:
        """Record the result of a task; raises DiskFull if a node's disk is full, which stops every run."""
        if isinstance(done.error, DiskFull):
            raise done.error
        if isinstance(done.task.job, CompressVariants):
            self._record_compression(done)
        else:
            self.record_evaluation(done.task.key, done.output, done.error, done.task.work)

    @property
    def waiting(self) -> int:
        """Number of tasks that are not started yet."""
        return len(self._compressions) + sum(len(run.measurement.tasks) for run in self._runs)

    def evaluable(self, runs: Collection[int]) -> list[Run]:
        """Those runs of the given numbers that have windows to evaluate, and whose matrices are compressed."""
        states = ((self._runs[number], self._runs[number].measurement) for number in sorted(runs))
        return [run for run, state in states if state.outstanding and not state.missing and not state.error]

    def unmeasured(self, run: Run) -> Iterator[tuple[EvaluationKey, EvaluateSettings, np.ndarray]]:
        """The parts of a run's windows without losses, with the settings of their evaluation."""
        for number, (windows, evaluation) in enumerate(self._inputs.evaluations_of(run)):
            for start, part in batch_parts(windows.ids, evaluation):
                if (number, start) not in run.measurement.losses:
                    yield EvaluationKey(run.number, number, start), evaluation, part

    def _open_if_ready(self, run: Run) -> None:
        """Create the evaluation tasks of a run once its last unit is compressed."""
        state = run.measurement
        if state.missing or state.error:
            return
        parts = list(self.unmeasured(run))
        state.outstanding = len(parts)
        if not parts:
            self._release(run)
        elif run.number not in self._in_blocks:
            state.tasks = [self._evaluation(run, *part) for part in reversed(parts)]

    def _evaluation(self, run: Run, key: EvaluationKey, settings: EvaluateSettings, part: np.ndarray) -> Task[Any]:
        """The task of a part of the windows of a run, whose matrices are compressed."""
        units = run.measurement.units
        checkpoint = run.tuned.checkpoint if run.tuned else self._inputs.checkpoint_of(run)
        job = MeasureLosses(model_key(checkpoint, settings), part, run.name if units else "", tuple(units))
        label = f"{run.name} on {self._inputs.location_of(run)}, window {key.first_window}"
        payloads = tuple(self.payloads[unit] for unit in units.values())
        return Task(key, job, label, payloads, work=forward_seconds(checkpoint.weights, part.size))

    def _record_compression(self, done: TaskResult[Any]) -> None:
        units: tuple[Unit, ...] = done.task.key
        for number, unit in enumerate(units):
            result = CompressionFailure(unit.matrix, str(done.error)) if done.error else done.value[number]
            if isinstance(result, MatrixResult):
                self.results[unit] = result
                self.payloads[unit] = done.payloads[number]
            self._advance_runs(unit, result.error if isinstance(result, CompressionFailure) else None)
            self._release_if_unused(unit)

    def _advance_runs(self, unit: Unit, error: str | None) -> None:
        """Note in every run that waited for a unit that it is compressed, or failed."""
        for run in self._runs:
            state = run.measurement
            if unit not in state.missing:
                continue
            state.missing.discard(unit)
            if error and not state.error:
                state.error = error
                self._release(run)
            self._open_if_ready(run)

    def record_evaluation(
        self, key: EvaluationKey, losses: WindowLosses | None, error: SwscError | None = None, work: float = 0.0
    ) -> None:
        """Record the losses of some windows, or why a run has none.

        Args:
            work: estimated work of the task, which will be repeated if compressed matrices were lost.
        """
        run = self._runs[key.run]
        state = run.measurement
        state.outstanding -= 1
        if error:
            if isinstance(error, PayloadLost) and state.recomputations < _MAX_RECOMPUTATIONS:
                state.lost = str(error)
                self._progress.add(1, work)
            else:
                state.error = state.error or str(error)
            state.outstanding -= len(state.tasks)
            state.tasks.clear()
        elif losses:
            state.losses[key.evaluation, key.first_window] = losses.losses
            state.dtypes[key.evaluation] = losses.dtype
        if state.outstanding == 0:
            self._recompute(run) if state.lost and not state.error else self._release(run)

    def _recompute(self, run: Run) -> None:
        """Compress all units of a run again, because some were lost with a node; measured losses stay."""
        state = run.measurement
        self._progress.log(f"{state.lost}; the matrices of {run.name} are compressed again")
        state.lost, state.recomputations = None, state.recomputations + 1
        for matrix, unit in state.units.items():
            if unit not in state.missing:
                state.missing.add(unit)
                info = find_matrix(self._inputs.checkpoint_of(run), matrix)
                task = _compression(self._inputs, info, [unit])
                self._compressions.append(task)
                self._progress.add(1, task.work)

    def _release(self, run: Run) -> None:
        """End a run, and release payloads that no other run needs."""
        units = list(run.measurement.units.values())
        run.measurement.units = {}
        for unit in units:
            self._release_if_unused(unit)

    def _release_if_unused(self, unit: Unit) -> None:
        runs = (run.measurement for run in self._runs)
        if not any(unit in state.units.values() and not state.error for state in runs):
            self.payloads.pop(unit, None)


def count_tasks(inputs: SweepInputs, runs: Sequence[Run], in_blocks: Collection[int] = ()) -> int:
    """Number of tasks of a sweep, if no unit is lost, besides the passes of the runs that are evaluated in blocks."""
    whole = (pair for run in runs if run.number not in in_blocks for pair in inputs.evaluations_of(run))
    parts = sum(len(batch_parts(windows.ids, evaluation)) for windows, evaluation in whole)
    return len(compression_tasks(inputs, runs)) + parts


def estimated_work(inputs: SweepInputs, runs: Sequence[Run]) -> float:
    """Work of all tasks of a sweep, if no unit is lost."""
    evaluated = [(inputs.checkpoint_of(run), windows) for run in runs for windows, _ in inputs.evaluations_of(run)]
    forward = sum(forward_seconds(checkpoint.weights, windows.ids.size) for checkpoint, windows in evaluated)
    return forward + sum(task.work for task in compression_tasks(inputs, runs))


def compression_tasks(inputs: SweepInputs, runs: Sequence[Run]) -> list[Task[Any]]:
    """A task per matrix, for all its units; the models take turns."""
    per_model = [
        _tasks_of_model(inputs, model, checkpoint, runs) for model, checkpoint in enumerate(inputs.checkpoints)
    ]
    return [task for task in chain.from_iterable(zip_longest(*per_model)) if task is not None]


def _tasks_of_model(inputs: SweepInputs, model: int, checkpoint: Checkpoint, runs: Sequence[Run]) -> list[Task[Any]]:
    units: dict[str, list[Unit]] = {}
    first_run: dict[str, int] = {}
    for run in runs:
        for matrix, unit in run.measurement.units.items():
            if run.model == model and unit not in units.setdefault(matrix, []):
                units[matrix].append(unit)
            first_run.setdefault(matrix, run.number)
    infos = {matrix: find_matrix(checkpoint, matrix) for matrix in units}
    # In the order in which runs need them, so that the first variants are evaluated while others are compressed.
    order = sorted(units, key=lambda matrix: (first_run[matrix], -infos[matrix].nbytes))
    return [_compression(inputs, infos[matrix], units[matrix]) for matrix in order]


def _compression(inputs: SweepInputs, info: MatrixInfo, units: list[Unit]) -> Task[Any]:
    model = units[0].model
    job = CompressVariants(inputs.checkpoints[model].store, info, tuple(unit.variant for unit in units))
    work = sum(matrix_seconds(info, unit.variant.specs) for unit in units)
    return Task(tuple(units), job, f"{inputs.settings.models[model]} {info.name}", outputs=len(units), work=work)
