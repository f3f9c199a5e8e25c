"""lm-evaluation-harness with a model in blocks: batches of requests travel from block to block, up to their scores."""

from collections.abc import Sequence
from typing import Any

from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.runner import BlockKey
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import forward_stations
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.evaluation.lm_eval_job import RequestAnswers, ScoreInBlock
from pipeline.models.loading import ModelKey


def score_in_blocks(
    key: ModelKey, layout: BlockLayout, parts: Sequence[list[list[Any]]], name: str, pool: Pool
) -> list[RequestAnswers]:
    """Answers to LOGLIKELIHOOD requests, part by part.

    Args:
        key: how the model is loaded.
        layout: its blocks.
        parts: batches of requests, in parts that travel together.
        name: of the stage, on its progress line.
        pool: runs the passes.

    Raises:
        RunError: a task failed.
    """
    block_key, blocks = BlockKey(key, layout.tuple_length), layout.blocks
    answers: dict[int, RequestAnswers] = {}

    def make_task(step: Pass, inputs: tuple[Any, ...]) -> Task[RequestAnswers]:
        block = blocks[step.station]
        job = ScoreInBlock(block_key, block, parts[step.shard], step.upcoming)
        label = f"{block}, part {step.shard} of the requests"
        return Task(step, job, label, inputs, outputs=int(not block.is_last))

    def on_done(step: Pass, result: TaskResult[RequestAnswers]) -> None:
        if blocks[step.station].is_last:
            answers[step.shard] = result.value

    schedule = BlockSchedule(forward_stations(blocks), len(parts), lambda: pool.size, make_task, on_done)
    with Progress(name, len(parts) * len(blocks), 0, unit="passes") as progress:
        execute(pool, schedule, progress)
    schedule.require_finished()
    return [answers[number] for number in sorted(answers)]
