"""A stage of a command: a group of tasks that one pool runs to the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.console import log
from pipeline.engine.memory import Room, WorkerMemory
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.task import Pool, Task, TaskResult

V = TypeVar("V")


@dataclass(frozen=True)
class Stage:
    """What a stage of a command needs from its pool.

    Attributes:
        name: name on its progress line.
        memory: what a worker is predicted to need.
        unit: plural name of what its progress counts.
        keeps_model: workers keep the model that is loaded from the stage before. True if jobs of this stage load a
            model, and their results do not depend on earlier uses of it.
        on_cpu: the jobs use no device, so workers are started without a GPU.
    """

    name: str
    memory: WorkerMemory
    unit: str = "tasks"
    keeps_model: bool = False
    on_cpu: bool = False


class Pools(Protocol):
    """Provides a pool for each stage of a command.

    Attributes:
        in_process: the only worker is this process.
    """

    in_process: bool

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """Return a pool for a stage of `tasks` tasks."""

    def require_workers(self, stage: Stage) -> None:
        """Raise ClusterError if the cluster cannot be reached or can hold no worker of a stage. It starts no worker.

        A command calls it before it writes anything that its refusal would leave behind.
        """

    def room(self) -> Room:
        """What a worker may hold: by the settings, or else what there is."""

    def release(self) -> None:
        """Stop the workers, so that another run can use their resources. The next stage starts new workers."""


def run_stage(pools: Pools, stage: Stage, tasks: list[Task[V]], on_done: Callable[[TaskResult[V]], None]) -> None:
    """Run the tasks as one stage; no-op without tasks.

    Raises:
        RunError: some tasks failed. It is raised after all other tasks have ended.
    """
    if not tasks:
        return
    source = TaskList(tasks, on_done)
    pool = pools(len(tasks), stage)
    units, work, nbytes = (sum(getattr(task, name) for task in tasks) for name in ("units", "work", "nbytes"))
    try:
        with Progress(stage.name, units, work, nbytes, stage.unit) as progress:
            execute(pool, source, progress)
    finally:
        pool.close()
    source.raise_failures()


def log_and_release(pools: Pools) -> Callable[[str], None]:
    """Return an `on_wait` callback for a run that waits for another run.

    It logs the line, and stops the idle workers because the other run may need their resources.
    """

    def on_wait(line: str) -> None:
        log(line)
        pools.release()

    return on_wait
