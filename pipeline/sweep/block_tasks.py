"""The task source of the evaluations of a model in blocks: the windows of all its variants pass through them.

All shards of one variant pass a block before those of the next, so that the variant's matrices are put into the block
once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import forward_stations
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import DiskFull, PayloadLost
from pipeline.evaluation.block_variants import matrices_of_blocks
from pipeline.evaluation.blocks_job import BlockResult, RunBlock
from pipeline.evaluation.flow import batch_parts
from pipeline.evaluation.job import WindowLosses
from pipeline.planning.time_model import forward_seconds
from pipeline.sweep.blocks import BlockedModel
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run
from pipeline.sweep.tasks import EvaluationKey, SweepTasks


@dataclass(frozen=True)
class VariantShard:
    """Windows of one evaluation of a run, in whole batches."""

    run: Run
    key: EvaluationKey
    windows: np.ndarray
    batch_size: int


class VariantPasses:
    """A `TaskSource`. A run that fails ends alone, and the others continue."""

    def __init__(self, blocked: BlockedModel, shards: Sequence[VariantShard], tasks: SweepTasks, pool: Pool) -> None:
        """Begin with all shards at the first block.

        Args:
            blocked: the model.
            shards: windows of runs whose matrices are compressed, run by run.
            tasks: has the compressed matrices, and receives the losses.
            pool: runs the passes.
        """
        self._blocked, self._shards, self._tasks = blocked, shards, tasks
        names = dict.fromkeys(name for shard in shards for name in shard.run.measurement.units)
        blocks = blocked.layout.blocks
        self._matrices = matrices_of_blocks(blocked.source, blocked.key.model, blocks, list(names))
        self._schedule = BlockSchedule(
            forward_stations(blocks), len(shards), lambda: pool.size, self._task_of, self._record_losses
        )
        self._ended: set[int] = set()  # numbers of the runs that failed
        self._lost: set[tuple[int, int]] = set()  # passes that lacked a payload

    def next(self, worker: int) -> Task[Any] | None:
        return self._schedule.next(worker)

    def done(self, result: TaskResult[BlockResult]) -> None:
        if isinstance(result.error, DiskFull):
            raise result.error
        completed: Pass = result.task.key
        shard = self._shards[completed.shard]
        if shard.run.number in self._ended:
            self._schedule.drop(completed.shard)
        elif result.error is None or self._is_hidden_lost(completed, result.error):
            self._schedule.done(result)
        else:
            self._end(shard, result)

    def require_finished(self) -> None:
        """Raise RunError unless all runs have ended."""
        self._schedule.require_finished()

    def _task_of(self, step: Pass, inputs: tuple[Any, ...]) -> Task[BlockResult]:
        shard, block = self._shards[step.shard], self._blocked.layout.blocks[step.station]
        units = shard.run.measurement.units
        names = tuple(name for name in self._matrices[step.station] if name in units)
        payloads = tuple(self._tasks.payloads[units[name]] for name in names)
        variant = shard.run.name if names else ""
        job = RunBlock(self._blocked.key, block, shard.windows, shard.batch_size, step.upcoming, variant, names)
        label = f"{shard.run.name}, {block}, window {shard.key.first_window}"
        work = forward_seconds(self._blocked.source.weights, shard.windows.size) / len(self._blocked.layout.blocks)
        return Task(step, job, label, (*payloads, *inputs), outputs=int(not block.is_last), work=work)

    def _record_losses(self, step: Pass, result: TaskResult[BlockResult]) -> None:
        if result.value.losses:
            losses = WindowLosses(result.value.losses, result.value.dtype)
            self._tasks.record_evaluation(self._shards[step.shard].key, losses)

    def _is_hidden_lost(self, completed: Pass, error: Exception) -> bool:
        """Whether hidden states may have been lost, which an earlier block computes again, and not a matrix."""
        passed = (completed.station, completed.shard)
        if not isinstance(error, PayloadLost) or completed.station == 0 or passed in self._lost:
            return False
        self._lost.add(passed)
        return True

    def _end(self, failed: VariantShard, result: TaskResult[BlockResult]) -> None:
        """End a run here. If its matrices were lost, `SweepTasks` has them compressed again."""
        self._ended.add(failed.run.number)
        for number, shard in enumerate(self._shards):
            if shard.run is failed.run:
                self._schedule.drop(number)
        failed.run.measurement.outstanding = 1
        self._tasks.record_evaluation(failed.key, None, result.error, result.task.work)


def variant_shards(blocked: BlockedModel, tasks: SweepTasks) -> list[VariantShard]:
    """The windows that are left to evaluate, variant by variant."""
    return [
        VariantShard(run, key, windows, settings.batch_size)
        for run in tasks.evaluable(blocked.runs)
        for key, settings, windows in tasks.unmeasured(run)
        if key.evaluation in blocked.evaluations
    ]


def count_passes(blocked: BlockedModel, inputs: SweepInputs, runs: Sequence[Run]) -> int:
    """Number of passes of all runs through all blocks, if no unit is lost."""
    evaluations = (inputs.evaluations_of(runs[run])[number] for run in blocked.runs for number in blocked.evaluations)
    parts = sum(len(batch_parts(windows.ids, settings)) for windows, settings in evaluations)
    return parts * len(blocked.layout.blocks)
