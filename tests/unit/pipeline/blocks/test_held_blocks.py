"""A schedule that follows another one leaves blocks with the workers that hold them."""

from collections.abc import Mapping
from typing import Any

from pipeline.blocks.block import Block
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import backward_stations
from pipeline.engine.task import JobContext, JobOutput, Task, TaskResult

BLOCKS = tuple(Block(layer, layer + 1, 3) for layer in range(3))
STATIONS = backward_stations(BLOCKS, adds=False)


class Nothing:
    def run(self, context: JobContext) -> JobOutput[None]:
        return JobOutput(None)


def served(held: Mapping[int, Block], workers: list[int]) -> tuple[list[tuple[int, Block]], Mapping[int, Block]]:
    """Which worker served which block, in the order of the passes of four shards; which block it holds in the end."""
    passes: list[tuple[int, Block]] = []
    schedule = BlockSchedule(
        STATIONS, 4, lambda: len(workers), lambda step, inputs: Task(step, Nothing()), lambda step, result: None, held
    )
    while tasks := [(worker, task) for worker in workers if (task := schedule.next(worker)) is not None]:
        for worker, task in tasks:
            step: Pass = task.key
            passes.append((worker, STATIONS[step.station].block))
            result: TaskResult[Any] = TaskResult(task, payloads=("handle",), worker=worker)
            schedule.done(result)
    schedule.require_finished()
    return passes, schedule.held


def test_a_worker_keeps_its_block_from_schedule_to_schedule() -> None:
    passes, held = served({}, [0, 1, 2])
    assert len({*passes}) == 3
    assert sorted(held) == [0, 1, 2]
    # The workers ask in another order, and would get other blocks if nothing were known.
    assert {*served(held, [2, 0, 1])[0]} == {*held.items()}


def test_the_backward_pass_without_sums_needs_no_order_of_shards() -> None:
    assert not any(station.adds for station in STATIONS)
    assert [station.block.start for station in STATIONS] == [0, 1, 2, 1, 0]
    assert len(served({}, [0])[0]) == 4 * 5
