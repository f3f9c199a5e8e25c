"""A stage of a command: tasks that one pool runs to the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.console import log
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.task import Pool, Task, TaskResult

V = TypeVar("V")


@dataclass(frozen=True)
class Stage:
    """A part of a command that runs on one pool.

    Attributes:
        name: of its progress line.
        memory: bytes that a worker is predicted to need.
        device: those of them that lie on its GPU, if it has one; 0: not predicted.
        unit: what its progress counts.
        keeps_model: a model may stay loaded from the stage before: jobs of this stage need one, and what they give does not depend on
            what it was used for.
        on_cpu: its jobs touch no device, so that workers take no GPU.
    """

    name: str
    memory: int
    device: int = 0
    unit: str = "tasks"
    keeps_model: bool = False
    on_cpu: bool = False


class Pools(Protocol):
    """Where the stages of a command get their pools from."""

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """A pool for a stage of so many tasks."""

    def release(self) -> None:
        """Stop the workers, so that another run gets what they take; the next stage starts new ones."""


def run_stage(pools: Pools, stage: Stage, tasks: list[Task[V]], on_done: Callable[[TaskResult[V]], None]) -> None:
    """Run tasks, if there are any, as one stage.

    Raises:
        RunError: tasks failed, after all the others ended.
    """
    if not tasks:
        return
    source = TaskList(tasks, on_done)
    pool = pools(len(tasks), stage)
    try:
        with Progress(stage.name, len(tasks), sum(task.weight for task in tasks), stage.unit) as progress:
            execute(pool, source, progress)
    finally:
        pool.close()
    source.raise_failures()


def log_and_release(pools: Pools) -> Callable[[str], None]:
    """`log`, for a run that waits for another one: its idle workers are stopped, because the other may need what they take."""

    def log_and_release(line: str) -> None:
        log(line)
        pools.release()

    return log_and_release
