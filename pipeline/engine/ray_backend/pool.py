"""The pool of one stage on Ray workers.

Payloads are Ray objects, and a commit is a Ray task on the node that holds the object.
A worker that died, hangs or can no longer use its GPU is replaced, and the driver decides about its task.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.checkpoints.tensor_io import commit
from pipeline.device import require_gpu_memory
from pipeline.engine.ray_backend.failures import Phase, classify
from pipeline.engine.ray_backend.memory_failures import MemoryFailures
from pipeline.engine.ray_backend.workers import RayWorkers
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import WorkerLost

_WAIT_SECONDS = 1.0
# Payloads per worker that wait to be written; this bounds the memory of the object store.
_COMMITS_PER_WORKER = 2
# The longest wait for commits under way when a stage ends.
_CLOSE_SECONDS = 30.0
# Time between two looks at the capacity of the cluster.
_CAPACITY_SECONDS = 10.0
# A task hangs if it takes this many times as long as the longest task of its kind, and no less than these seconds.
_HANG_FACTOR, _MIN_HANG_SECONDS = 20.0, 600.0
# The kind of commits, and the time that is assumed for the longest commit until one has ended.
_COMMITS, _FIRST_COMMIT_SECONDS = "commit", 180.0

# A commit requests no CPU: workers hold all CPUs, and a commit must not wait for them.
_COMMIT = ray.remote(num_cpus=0, max_retries=3)(commit)


@dataclass
class _Flight:
    """A task under way: its job, then the commit of its payload if it has one.

    Attributes:
        value_ref: Ray's reference of the job's value.
        payloads: references of the job's payloads.
        record_ref: reference of the commit's result; None if nothing is committed.
        value: the job's value, once the job has ended.
        started: when the job, or then the commit, was started.
    """

    task: Task[Any]
    worker: int
    value_ref: Any
    payloads: tuple[Any, ...]
    record_ref: Any
    value: Any = None
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class StageLimits:
    """Limits of a stage.

    Attributes:
        capacity: returns how many workers the stage may have now; called repeatedly.
        waiting_for: describes what a worker needs and what the cluster has.
        deadline: seconds that a task may take; None to detect tasks that hang by comparison with others.
        device: bytes that a worker is predicted to need on its GPU, if it has one.
    """

    capacity: Callable[[], int]
    waiting_for: Callable[[], str]
    deadline: float | None = None
    device: int = 0


class RayPool:
    """Runs tasks on Ray workers, each of which runs one task at a time.

    It starts more workers when the cluster grows.
    """

    def __init__(self, workers: RayWorkers, limits: StageLimits, keeps_model: bool = True) -> None:
        """Begin a stage.

        Args:
            workers: shared by the stages of a command.
            limits: limits of this stage.
            keeps_model: workers keep the model that is loaded from the stage before.

        Raises:
            ClusterError: the GPU of a running worker is too small.
        """
        self._workers, self._limits = workers, limits
        for worker in workers.up():
            require_gpu_memory(limits.device, workers.devices[worker].nbytes)
        workers.begin_stage(keeps_model)
        self._capacity_checked = time.monotonic()
        workers.grow_to(limits.capacity())
        # Kind of task -> seconds of its longest finished task.
        self._longest: dict[str, float] = {}
        self._memory_failures = MemoryFailures()
        self._working: dict[int, _Flight] = {}
        self._committing: list[_Flight] = []

    @property
    def size(self) -> int:
        return self._workers.size

    def _grow(self) -> None:
        """Start workers on new nodes. Workers of nodes that left stay in the pool and wait for free resources."""
        if time.monotonic() - self._capacity_checked < _CAPACITY_SECONDS:
            return
        self._capacity_checked = time.monotonic()
        try:
            capacity = self._limits.capacity()
        except (RayError, RuntimeError, ConnectionError):
            # The head does not answer, but the workers can continue without it.
            return
        self._workers.grow_to(capacity)

    def waiting_for(self) -> str:
        try:
            return self._limits.waiting_for()
        except (RayError, RuntimeError, ConnectionError):
            return "the cluster's head does not answer"

    def idle(self) -> list[int]:
        self._grow()
        if len(self._committing) >= _COMMITS_PER_WORKER * self.size:
            return []
        return [worker for worker in self._workers.up() if worker not in self._working]

    def start(self, worker: int, task: Task[Any]) -> None:
        # The name is part of the process's title, so that `ps` and `ray summary` show what a worker does.
        call = self._workers.actors[worker].run_task.options(
            name=f"ActorWorker.{task.kind}", num_returns=1 + task.outputs
        )
        refs = call.remote(task.job, *task.payloads)
        value_ref, payloads = (refs[0], tuple(refs[1:])) if task.outputs else (refs, ())
        target = task.commit_to
        record_ref = _COMMIT.remote(target.ticket, target.file, payloads[0]) if target else None
        self._working[worker] = _Flight(task, worker, value_ref, payloads, record_ref)

    def wait(self) -> TaskResult[Any] | None:
        flights = {flight.value_ref: flight for flight in self._working.values()}
        flights |= {flight.record_ref: flight for flight in self._committing}
        starting = self._workers.starting
        ready, _ = ray.wait([*flights, *starting], num_returns=1, timeout=_WAIT_SECONDS, fetch_local=False)
        if overdue := self._end_overdue():
            return overdue
        if not ready:
            return None
        if ready[0] in starting:
            self._workers.on_started(ready[0], self._limits.device)
            return None
        return self._on_ready(flights[ready[0]], ready[0])

    def _on_ready(self, flight: _Flight, ref: Any) -> TaskResult[Any] | None:
        """Process the end of a job or of a commit; returns a result once both are done."""
        phase = Phase.COMMIT if ref == flight.record_ref else Phase.JOB
        try:
            value = ray.get(ref)
        except RayError as error:
            return self._on_failure(flight, phase, error)
        self._workers.deaths = 0
        self._memory_failures.succeeded()
        self._record_time(flight, _COMMITS if phase is Phase.COMMIT else flight.task.kind)
        if phase is Phase.COMMIT:
            self._committing.remove(flight)
            return TaskResult(flight.task, flight.value, (), value, worker=flight.worker)
        del self._working[flight.worker]
        flight.value = value
        if flight.record_ref is None:
            return TaskResult(flight.task, value, flight.payloads, worker=flight.worker)
        # The commit holds the payload until it has written it.
        flight.payloads, flight.started = (), time.monotonic()
        self._committing.append(flight)
        return None

    def _end_overdue(self) -> TaskResult[Any] | None:
        """End the process of a job or commit that hangs, if there is one."""
        for flight in self._working.values():
            if self._hangs(flight, flight.value_ref, flight.task.kind):
                del self._working[flight.worker]
                self._workers.replace(flight.worker, flight.task.label)
                return _abandoned(flight, "hangs")
        for flight in self._committing:
            if self._hangs(flight, flight.record_ref, _COMMITS):
                self._committing.remove(flight)
                ray.cancel(flight.record_ref, force=True)
                return _abandoned(flight, "its commit hangs")
        return None

    def _hangs(self, flight: _Flight, ref: Any, kind: str) -> bool:
        longest = self._longest.get(kind, _FIRST_COMMIT_SECONDS if kind == _COMMITS else None)
        hang_seconds = max(_MIN_HANG_SECONDS, _HANG_FACTOR * longest) if longest else None
        limit, seconds = self._limits.deadline or hang_seconds, time.monotonic() - flight.started
        return bool(limit and seconds > limit and not ray.wait([ref], timeout=0, fetch_local=False)[0])

    def _record_time(self, flight: _Flight, kind: str) -> None:
        seconds = time.monotonic() - flight.started
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _on_failure(self, flight: _Flight, phase: Phase, error: RayError) -> TaskResult[Any]:
        """Carry out what follows from a failure."""
        worker, label = flight.worker, flight.task.label
        failure = classify(error, phase, label, phase is Phase.JOB and _is_lost(self._workers.nodes[worker]))
        if phase is Phase.COMMIT:
            self._committing.remove(flight)
        else:
            del self._working[worker]
        if failure.replaces_worker:
            self._workers.replace(worker, label if failure.blames_worker else "")
        error_of_task = self._memory_failures.decide(flight.task.key, failure).error
        return TaskResult(flight.task, error=error_of_task, worker=worker)

    def close(self) -> None:
        """End the stage: stop workers that run a task, and wait for commits under way.

        Nothing is written afterwards.
        """
        try:
            for worker in self._working:
                self._workers.stop(worker)
            flights = (*self._committing, *self._working.values())
            pending = [flight.record_ref for flight in flights if flight.record_ref]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_CLOSE_SECONDS, fetch_local=False)
        except RayError:
            # Ray itself has ended. The error that ended the run names the cause.
            pass
        self._working, self._committing = {}, []


def _is_lost(node_id: str) -> bool:
    """Whether a node is known to be dead; False if the head does not answer."""
    try:
        return any(node["NodeID"] == node_id and not node["Alive"] for node in ray.nodes())
    except (RayError, RuntimeError, ConnectionError):
        return False


def _abandoned(flight: _Flight, reason: str) -> TaskResult[Any]:
    seconds = time.monotonic() - flight.started
    error = WorkerLost(f"{flight.task.label}: {reason}, abandoned after {seconds:.0f} s")
    return TaskResult(flight.task, error=error, worker=flight.worker)
