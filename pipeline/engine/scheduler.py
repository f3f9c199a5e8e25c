"""The loop that keeps workers busy. It holds names, handles and small reports; weights never pass through it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from pipeline.engine import signals
from pipeline.engine.progress import Progress
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import DiskFull, LeaseLost, NodeLost, RunError, StoreError, StoreOutage, UserError, WorkerLost

# Seconds without any worker until a line reports it, and the factor for the time between further lines.
_PATIENCE_SECONDS, _LONGER = 20.0, 6
# Causes that the error of a failed run names.
_MAX_CAUSES = 8
# Rounds in which idle workers get nothing and no task runs, after which the stage ends. A source needs several to
# notice that a worker for which it keeps tasks does not ask.
IDLE_ROUNDS = 3
# Attempts at a task whose worker, payload or store is lost.
_MAX_ATTEMPTS = 3
# The loss of a node counts as this many attempts, because it hits every task that runs there, again and again.
_NODE_LOSS_ATTEMPTS = 0.25

V = TypeVar("V")


class TaskSource(Protocol):
    """Provides tasks and takes their results. It decides only; it has no effect on the pool."""

    def next(self, worker: int) -> Task[Any] | None:
        """Return a task for an idle worker, or None if there is none for it at present."""

    def done(self, result: TaskResult[Any]) -> None:
        """Process the result of a task that succeeded or failed."""


class TaskList(Generic[V]):
    """A fixed list of tasks, started in the given order. A failed task does not stop the others."""

    def __init__(self, tasks: Iterable[Task[V]], on_done: Callable[[TaskResult[V]], None]) -> None:
        self._tasks = list(tasks)[::-1]
        self._on_done = on_done
        self._failed: list[TaskResult[V]] = []

    def next(self, worker: int) -> Task[V] | None:
        return self._tasks.pop() if self._tasks else None

    def done(self, result: TaskResult[V]) -> None:
        # The input is wrong, another run has taken over, or the disk or store is unusable: the other tasks would fail,
        # too.
        if isinstance(result.error, (UserError, LeaseLost, DiskFull, StoreOutage)):
            raise result.error
        if result.error:
            self._failed.append(result)
        else:
            self._on_done(result)

    def raise_failures(self) -> None:
        """Raise RunError that names the failed tasks, if there are any."""
        if self._failed:
            causes = "; ".join(str(result.error) for result in self._failed[:_MAX_CAUSES])
            more = f"; and {len(self._failed) - _MAX_CAUSES} more" if len(self._failed) > _MAX_CAUSES else ""
            raise RunError(f"{len(self._failed)} tasks failed, the others are finished and kept: {causes}{more}")


class TaskRound(Generic[V]):
    """Tasks whose results are needed together. The first failed task ends all."""

    def __init__(self, tasks: Iterable[Task[V]]) -> None:
        self._tasks = list(tasks)
        self._waiting = self._tasks[::-1]
        self._results: dict[object, TaskResult[V]] = {}

    def next(self, worker: int) -> Task[V] | None:
        return self._waiting.pop() if self._waiting else None

    def done(self, result: TaskResult[V]) -> None:
        if result.error:
            raise result.error
        self._results[result.task.key] = result

    @property
    def results(self) -> list[TaskResult[V]]:
        """The results of finished tasks, in the order of the tasks."""
        return [self._results[task.key] for task in self._tasks]


def execute(pool: Pool, source: TaskSource, progress: Progress) -> None:
    """Run the tasks of `source` on `pool` until none is left and none is under way.

    A task whose worker was lost, or whose store did not answer, is repeated, up to `_MAX_ATTEMPTS` attempts in all.
    """
    retries = _Retries(progress)
    running = idle_rounds = 0
    patience = time.monotonic() + _PATIENCE_SECONDS
    while True:
        signals.raise_if_interrupted()
        for worker in pool.idle():
            task = retries.next_now() or source.next(worker) or retries.next_late()
            if task is not None:
                pool.start(worker, task)
                running += 1
                progress.task_started(task.units)
        idle_rounds = idle_rounds + 1 if not running and pool.idle() else 0
        if idle_rounds == IDLE_ROUNDS:
            return
        if idle_rounds:
            continue
        result = pool.wait()
        progress.tick()
        if result is not None:
            running -= 1
            progress.task_ended(result.task.units)
            if not retries.take(result):
                progress.advance(result.task.work, result.task.nbytes, result.task.units)
                source.done(result)
        elif not running and time.monotonic() > patience:
            progress.log(f"no worker is up yet, waiting for one: {pool.waiting_for()}")
            patience = time.monotonic() + _LONGER * _PATIENCE_SECONDS


class _Retries:
    """Tasks that failed through no fault of their own, and their attempts.

    The first repetition is due at once, because other tasks may wait for its result. Further ones come last, so that a
    task which kills every worker does not end the run before the others are finished. Workers hold no queue, so only
    the task that ran on a lost worker is charged with the loss.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._now: list[Task[Any]] = []
        self._late: list[Task[Any]] = []
        self._attempts: defaultdict[object, float] = defaultdict(float)

    def next_now(self) -> Task[Any] | None:
        """Return a task to start before any other."""
        return self._now.pop() if self._now else None

    def next_late(self) -> Task[Any] | None:
        """Return a task to start when no other is left."""
        return self._late.pop() if self._late else None

    def take(self, result: TaskResult[Any]) -> bool:
        """Count an attempt, and return whether its task will be repeated."""
        key, error = result.task.key, result.error
        self._attempts[key] += _NODE_LOSS_ATTEMPTS if isinstance(error, NodeLost) else 1
        lost = isinstance(error, (WorkerLost, StoreError)) and not isinstance(error, StoreOutage)
        if not lost or self._attempts[key] >= _MAX_ATTEMPTS:
            return False
        self._progress.log(f"{error}; starting it again")
        (self._now if self._attempts[key] <= 1 else self._late).append(result.task)
        return True
