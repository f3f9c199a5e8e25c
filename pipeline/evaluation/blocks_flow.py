"""Evaluation of a model in blocks: shards of windows travel from block to block, up to the losses."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.runner import BlockKey
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import forward_stations
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Task, TaskResult
from pipeline.evaluation.blocks_job import BlockResult, RunBlock
from pipeline.evaluation.job import WindowLosses
from pipeline.models.loading import ModelKey


def measure_in_blocks(
    key: ModelKey,
    layout: BlockLayout,
    working: WorkerMemory,
    parts: Sequence[tuple[int, np.ndarray]],
    pools: Pools,
    on_losses: Callable[[int, WindowLosses], None],
) -> None:
    """Measure the losses of windows.

    Args:
        layout: the blocks.
        working: what a worker needs besides a block.
        parts: windows in parts of whole batches, each with the index of its first window.
        on_losses: receives that index and the losses of the part.

    Raises:
        RunError: a task failed.
    """
    block_key = BlockKey(key, layout.tuple_length)

    def make_task(step: Pass, inputs: tuple[Any, ...]) -> Task[BlockResult]:
        start, windows = parts[step.shard]
        block = layout.blocks[step.station]
        job = RunBlock(block_key, block, windows, key.batch_size, step.upcoming)
        label = f"{block}, windows {start} to {start + len(windows) - 1}"
        return Task(step, job, label, inputs, outputs=int(not block.is_last))

    def on_done(step: Pass, result: TaskResult[BlockResult]) -> None:
        if result.value.losses:
            on_losses(parts[step.shard][0], WindowLosses(result.value.losses, result.value.dtype))

    n_tasks = len(parts) * len(layout.blocks)
    stage = Stage("evaluate", working + layout.weights, "passes", keeps_model=True)
    pool = pools(min(len(parts), len(layout.blocks)), stage)
    schedule = BlockSchedule(forward_stations(layout.blocks), len(parts), lambda: pool.size, make_task, on_done)
    try:
        with Progress(stage.name, n_tasks, 0, unit=stage.unit) as progress:
            execute(pool, schedule, progress)
    finally:
        pool.close()
    schedule.require_finished()
