"""The loop that keeps workers busy. It holds names, handles and small reports; a weight never passes through it."""

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, Protocol, TypeVar

from pipeline.engine import signals
from pipeline.engine.progress import Progress
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import DiskFull, LeaseLost, NodeLost, RunError, StoreError, StoreOutage, UserError, WorkerLost

_SECONDS_OF_PATIENCE = 20.0  # before a run that has no worker says so
_CAUSES = 8  # that a failed run names
_ATTEMPTS = 3  # of a task whose worker, object or store went away under it
_OF_A_NODE = 0.25  # attempts that the loss of a node counts as: it may happen again and again to whoever is there

V = TypeVar("V")


class TaskSource(Protocol):
    """Where tasks come from and results go: decisions only, no effects on the pool."""

    def next(self, worker: int) -> Task[Any] | None:
        """A task for an idle worker, or None if there is none for it at present."""

    def done(self, done: TaskResult[Any]) -> None:
        """Take note of a task that ended, well or badly."""


class TaskList(Generic[V]):
    """A fixed list of tasks in the order given. One that fails does not stop the others."""

    def __init__(self, tasks: Iterable[Task[V]], on_done: Callable[[TaskResult[V]], None]) -> None:
        self._tasks = list(tasks)[::-1]
        self._on_done = on_done
        self._failed: list[TaskResult[V]] = []

    def next(self, worker: int) -> Task[V] | None:
        return self._tasks.pop() if self._tasks else None

    def done(self, done: TaskResult[V]) -> None:
        if isinstance(done.error, (UserError, LeaseLost, DiskFull, StoreOutage)):
            # What the user gave is at fault, another run is at it, or no disk or store takes it: other tasks would be for nothing.
            raise done.error
        if done.error:
            self._failed.append(done)
        else:
            self._on_done(done)

    def raise_failures(self) -> None:
        """Raise RunError that names each task that failed."""
        if self._failed:
            causes = "; ".join(str(done.error) for done in self._failed[:_CAUSES])
            more = f"; and {len(self._failed) - _CAUSES} more" if len(self._failed) > _CAUSES else ""
            raise RunError(f"{len(self._failed)} tasks failed, the others are finished and kept: {causes}{more}")


# Yields tasks, and is sent their results in the same order.
Rounds = Generator[list[Task[Any]], list[TaskResult[Any]], None]


class TaskRounds:
    """Rounds of tasks, each made from what came of the one before. The first task that fails ends all."""

    def __init__(self, stages: Rounds) -> None:
        self._stages = stages
        self._found: dict[object, TaskResult[Any]] = {}
        self._keys: list[object] = []
        self._open(next(stages, []))

    def _open(self, tasks: list[Task[Any]]) -> None:
        self._waiting = tasks[::-1]
        self._keys = [task.key for task in tasks]
        self._found = {}

    def next(self, worker: int) -> Task[Any] | None:
        return self._waiting.pop() if self._waiting else None

    def done(self, done: TaskResult[Any]) -> None:
        if done.error:
            raise done.error
        self._found[done.task.key] = done
        if len(self._found) == len(self._keys):
            found = [self._found[key] for key in self._keys]
            try:
                self._open(self._stages.send(found))
            except StopIteration:
                self._open([])


def execute(pool: Pool, source: TaskSource, progress: Progress) -> None:
    """Run tasks of `source` on `pool` until there are none left and none under way.

    A task whose worker died, or whose store did not answer, is done again, at most _ATTEMPTS times: at once, others may be
    waiting for it; after that when nothing else is left to do. Only the task that the worker was at is charged with it: workers
    hold no queue.
    """
    again: list[Task[Any]] = []
    last: list[Task[Any]] = []
    attempts: defaultdict[object, float] = defaultdict(float)
    running = 0
    patience = time.monotonic() + _SECONDS_OF_PATIENCE
    while True:
        signals.raise_if_interrupted()
        for worker in pool.idle():
            task = again.pop() if again else source.next(worker)
            if task is None and last:
                task = last.pop()
            if task is not None:
                pool.start(worker, task)
                running += 1
        if not running and pool.idle():
            return  # workers are there, and nothing is left for them
        done = pool.wait()
        progress.tick()
        if done is None:
            if not running and time.monotonic() > patience:
                progress.log(f"no worker is up yet, waiting for one: {pool.waiting_for()}")
                patience = time.monotonic() + 6 * _SECONDS_OF_PATIENCE
            continue
        running -= 1
        attempts[done.task.key] += _OF_A_NODE if isinstance(done.error, NodeLost) else 1
        lost = isinstance(done.error, (WorkerLost, StoreError)) and not isinstance(done.error, StoreOutage)
        if lost and attempts[done.task.key] < _ATTEMPTS:
            progress.log(f"{done.error}; starting it again")
            (again if attempts[done.task.key] <= 1 else last).append(done.task)
            continue
        progress.advance(done.task.weight)
        source.done(done)
