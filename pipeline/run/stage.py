"""A stage of a command: a list of tasks that a pool runs to the end."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.run.driver import TaskList, execute
from pipeline.run.progress import Progress
from pipeline.run.task import Pool, Task, TaskResult

V = TypeVar("V")

# (number of tasks, bytes of memory that a worker needs, bytes of them that must fit a GPU if it has one) -> a pool for them
PoolMaker = Callable[..., Pool]


def run_stage(
    tasks: list[Task[V]], memory: int, note: Callable[[TaskResult[V]], None], make_pool: PoolMaker, what: str, unit: str,
    device: int = 0,
) -> None:  # fmt: skip
    """Run tasks, if there are any, on a pool of their own, of workers that need `memory` bytes each.

    Raises:
        RunError: tasks failed, after all the others ended.
    """
    if not tasks:
        return
    source = TaskList(tasks, note)
    pool = make_pool(len(tasks), memory, device)
    try:
        with Progress(what, len(tasks), sum(task.weight for task in tasks), unit) as progress:
            execute(pool, source, progress)
    finally:
        pool.close()
    source.raise_failures()
