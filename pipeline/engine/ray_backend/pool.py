"""One stage of a command on workers of Ray: payloads are objects, commits are tasks on the node that holds the object.

A worker that died, hangs or cannot use its GPU any more is replaced, and the driver decides about its task.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline import device as gpu
from pipeline.checkpoints.tensor_io import commit
from pipeline.engine.ray_backend.failures import Cause, Failure, Phase, classify
from pipeline.engine.ray_backend.workers import RayWorkers
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import RunError, WorkerLost

_WAIT_SECONDS = 1.0
_COMMITS_PER_WORKER = 2  # payloads waiting to be written; bounds what lies in the object store
_CLOSE_SECONDS = 30.0  # longest wait for commits under way
_LOOK_SECONDS = 10.0  # between two looks at what has joined the cluster
# A task hangs if it takes _TIMES as long as the longest of its kind so far, and no less than _LEAST_SECONDS:
_TIMES, _LEAST_SECONDS = 20.0, 600.0
_OUT_OF_MEMORY = 2  # tries of a task that finds the memory of a GPU too small: another process may have the room
_OUT_OF_MEMORY_IN_A_ROW = 3 * _OUT_OF_MEMORY  # of any tasks, without one that ended well: the run is not for these GPUs
_COMMITS, _FIRST_COMMIT_SECONDS = "commit", 180.0  # the kind that commits are, and how long one may be foreseen to take


_COMMIT = ray.remote(num_cpus=0, max_retries=3)(commit)  # no CPU: workers hold them all, and it must not wait for one


@dataclass
class _Flight:
    """A task under way: first its job (`report`), then, if a payload is to be written, its commit."""

    task: Task[Any]
    worker: int
    report: Any
    payloads: tuple[Any, ...]
    record: Any
    value: Any = None
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class StageLimits:
    """What bounds a stage.

    Attributes:
        room: how many workers there may be, asked again and again.
        waiting_for: what a worker needs and what there is of it, in words.
        deadline: seconds of a task, if the user set any.
        device: bytes that a worker is predicted to need of its GPU, if it has one.
    """

    room: Callable[[], int]
    waiting_for: Callable[[], str]
    deadline: float | None = None
    device: int = 0


class RayPool:
    """Runs tasks on workers of Ray, one task at a time each; on as many as the cluster has room for, also when it grows."""

    def __init__(self, workers: RayWorkers, stage: StageLimits, keeps_model: bool = True) -> None:
        """Begin a stage; without `keeps_model` workers drop the model of the one before.

        Raises ClusterError if the GPU of a worker that is up is too small for it.
        """
        self._workers, self._stage = workers, stage
        for worker in workers.up():
            gpu.require_gpu_memory(stage.device, workers.devices[worker].nbytes)
        workers.begin_stage(keeps_model)
        self._looked = time.monotonic()
        workers.grow_to(stage.room())
        self._longest: dict[str, float] = {}  # seconds of a finished task, by kind
        self._out_of_memory: Counter[Any] = Counter()  # tries of a task, by its key
        self._out_of_memory_in_a_row = 0
        self._working: dict[int, _Flight] = {}
        self._committing: list[_Flight] = []

    @property
    def size(self) -> int:
        return self._workers.size

    def _grow(self) -> None:
        """Start workers for what has joined the cluster; those of nodes that left stay, and wait for a place."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            room = self._stage.room()
        except (RayError, RuntimeError, ConnectionError):
            return  # the head does not answer; workers may well go on without it
        self._workers.grow_to(room)

    def waiting_for(self) -> str:
        try:
            return self._stage.waiting_for()
        except (RayError, RuntimeError, ConnectionError):
            return "the cluster's head does not answer"

    def idle(self) -> list[int]:
        self._grow()
        if len(self._committing) >= _COMMITS_PER_WORKER * self.size:
            return []
        return [worker for worker in self._workers.up() if worker not in self._working]

    def start(self, worker: int, task: Task[Any]) -> None:
        # the name is part of the process's title, so that `ps` and `ray summary` show what a worker does
        call = self._workers.actors[worker].run_task.options(
            name=f"ActorWorker.{task.kind}", num_returns=1 + task.outputs
        )
        refs = call.remote(task.job, *task.payloads)
        report, payloads = (refs[0], tuple(refs[1:])) if task.outputs else (refs, ())
        where = task.commit_to
        record = _COMMIT.remote(where.ticket, where.file, payloads[0]) if where else None
        self._working[worker] = _Flight(task, worker, report, payloads, record)

    def wait(self) -> TaskResult[Any] | None:
        flights = {flight.report: flight for flight in self._working.values()}
        flights |= {flight.record: flight for flight in self._committing}
        coming = self._workers.coming
        ready, _ = ray.wait([*flights, *coming], num_returns=1, timeout=_WAIT_SECONDS, fetch_local=False)
        if overdue := self._overdue():
            return overdue
        if not ready:
            return None
        if ready[0] in coming:
            self._workers.arrived(ready[0], self._stage.device)
            return None
        flight, ref = flights[ready[0]], ready[0]
        try:
            result = ray.get(ref)
        except RayError as error:
            return self._failed(flight, Phase.COMMIT if ref == flight.record else Phase.JOB, error)
        self._workers.deaths = self._out_of_memory_in_a_row = 0
        self._note_time(flight, _COMMITS if ref == flight.record else flight.task.kind)
        if ref == flight.record:
            self._committing.remove(flight)
            return TaskResult(flight.task, flight.value, (), result, worker=flight.worker)
        del self._working[flight.worker]
        flight.value = result
        if flight.record is None:
            return TaskResult(flight.task, result, flight.payloads, worker=flight.worker)
        flight.payloads, flight.started = (), time.monotonic()  # the commit holds the payload until it is done
        self._committing.append(flight)
        return None

    def _overdue(self) -> TaskResult[Any] | None:
        """A task or a commit that takes so long that its process must hang, which is then ended."""
        for flight in self._working.values():
            if self._hangs(flight, flight.report, flight.task.kind):
                del self._working[flight.worker]
                self._workers.replace(flight.worker, flight.task.label)
                return _given_up(flight, "hangs")
        for flight in self._committing:
            if self._hangs(flight, flight.record, _COMMITS):
                self._committing.remove(flight)
                ray.cancel(flight.record, force=True)
                return _given_up(flight, "its commit hangs")
        return None

    def _hangs(self, flight: _Flight, ref: Any, kind: str) -> bool:
        longest = self._longest.get(kind, _FIRST_COMMIT_SECONDS if kind == _COMMITS else None)
        foreseen = max(_LEAST_SECONDS, _TIMES * longest) if longest else None
        limit, seconds = self._stage.deadline or foreseen, time.monotonic() - flight.started
        return bool(limit and seconds > limit and not ray.wait([ref], timeout=0, fetch_local=False)[0])

    def _note_time(self, flight: _Flight, kind: str) -> None:
        seconds = time.monotonic() - flight.started
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _failed(self, flight: _Flight, phase: Phase, error: RayError) -> TaskResult[Any]:
        """Carry out what follows from a failure."""
        worker, label = flight.worker, flight.task.label
        failure = classify(error, phase, label, phase is Phase.JOB and _is_gone(self._workers.nodes[worker]))
        if phase is Phase.COMMIT:
            self._committing.remove(flight)
        else:
            del self._working[worker]
        if failure.replaces_worker:
            self._workers.replace(worker, label if failure.blames_worker else "")
        if failure.cause is Cause.GPU_MEMORY:
            failure = self._out_of_gpu_memory(flight.task, failure)
        return TaskResult(flight.task, error=failure.error, worker=worker)

    def _out_of_gpu_memory(self, task: Task[Any], failure: Failure) -> Failure:
        """The task runs once more, in the fresh process; the second time it is the task's own failure.

        Raises:
            RunError: one task after the other ran out of memory.
        """
        self._out_of_memory[task.key] += 1
        self._out_of_memory_in_a_row += 1
        if self._out_of_memory_in_a_row >= _OUT_OF_MEMORY_IN_A_ROW:
            raise RunError(f"one task after the other, the last one {failure.error}")
        if self._out_of_memory[task.key] < _OUT_OF_MEMORY:
            return Failure(failure.cause, WorkerLost(str(failure.error).removesuffix(f"; {gpu.ROOM}")))
        return failure

    def close(self) -> None:
        """End the stage: stop workers that are at a task, and wait for commits under way. Nothing is written after this."""
        try:
            for worker in self._working:
                self._workers.stop(worker)
            pending = [flight.record for flight in (*self._committing, *self._working.values()) if flight.record]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_CLOSE_SECONDS, fetch_local=False)
        except RayError:
            pass  # Ray itself is gone; the error that says why is on its way to the user
        self._working, self._committing = {}, []


def _is_gone(node: str) -> bool:
    """Whether a node is known to be dead."""
    try:
        return any(one["NodeID"] == node and not one["Alive"] for one in ray.nodes())
    except (RayError, RuntimeError, ConnectionError):
        return False  # the head does not answer


def _given_up(flight: _Flight, why: str) -> TaskResult[Any]:
    seconds = time.monotonic() - flight.started
    lost = WorkerLost(f"{flight.task.label}: {why}, given up after {seconds:.0f} s")
    return TaskResult(flight.task, error=lost, worker=flight.worker)
