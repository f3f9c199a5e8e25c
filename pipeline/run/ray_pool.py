"""Actors of Ray that do tasks, payloads as objects, commits as tasks beside the objects.

Ray's own retries are off (`max_restarts=0`, `max_task_retries=0`): they stay bound to the dead actor. A worker that died, hangs
or cannot use its GPU any more is replaced here, and the driver decides about its task.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import device as gpu
from pipeline.errors import RunError, SwscError, WorkerLost
from pipeline.model.parts import commit
from pipeline.run import interrupt
from pipeline.run.actor import ActorWorker
from pipeline.run.failures import Cause, Failure, Phase, classify
from pipeline.run.task import Task, TaskResult

_WAIT_SECONDS = 1.0
_COMMITS_PER_WORKER = 2  # payloads waiting to be written; bounds what lies in the object store
_CLOSE_SECONDS = 30.0  # longest wait for commits under way
_DEATHS, _DEATHS_PER_WORKER = 30, 5  # in a row, without a task that ended well: the larger of both ends a run
_LOOK_SECONDS = 10.0  # between two looks at what has joined the cluster
# A task hangs if it takes _TIMES as long as the longest of its kind so far, and no less than _LEAST_SECONDS:
_TIMES, _LEAST_SECONDS = 20.0, 600.0
_OUT_OF_MEMORY = 2  # tries of a task that finds the memory of a GPU too small: another process may have the room
_OUT_OF_MEMORY_IN_A_ROW = 3 * _OUT_OF_MEMORY  # of any tasks, without one that ended well: the run is not for these GPUs
_COMMITS, _FIRST_COMMIT_SECONDS = "commit", 180.0  # the kind that commits are, and how long one may be foreseen to take


_ACTOR = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(ActorWorker)
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


class RayPool:
    """Actors of Ray, one task at a time each; as many as the cluster has room for, also when it grows."""

    def __init__(
        self,
        room: Callable[[], int],
        options: dict[str, Any],
        threads: int,
        started_here: bool,
        deadline: float | None,
        waiting_for: Callable[[], str],
        device: int = 0,
        kind: str | None = None,
    ) -> None:
        """Begin all workers.

        Args:
            room: how many there may be, asked again and again.
            options: of an actor: CPUs, GPUs, memory.
            threads: of a worker.
            started_here: whether Ray ends with this pool.
            deadline: seconds of a task, if the user set any.
            waiting_for: what a worker needs and what there is of it, in words.
            device: bytes that a worker is foretold to need of its GPU, if it has one.
            kind: of device that every worker must have; None: that of the first one.
        """
        self.size = room()
        self._room, self._looked = room, time.monotonic()
        self._deadline, self._device = deadline, device
        self._waiting_for = waiting_for
        self._longest: dict[str, float] = {}  # seconds of a finished task, by kind
        self._options = options
        self._kind = kind  # of the device of every worker
        self.capabilities: set[str] = set()  # of the CPUs of the workers
        self._out_of_memory: Counter[Any] = Counter()  # tries of a task, by its key
        self._out_of_memory_in_a_row = 0
        self._threads = threads
        self._started_here = started_here
        self._coming: dict[Any, int] = {}  # what tells that a worker is up -> the worker
        self._nodes: dict[int, str] = {}  # worker -> Ray's name of its node
        self._actors = [self._spawn(worker) for worker in range(self.size)]
        self._working: dict[int, _Flight] = {}
        self._committing: list[_Flight] = []
        self._deaths = 0  # of workers, since a task ended well

    def _spawn(self, worker: int) -> Any:
        """A new actor. It gets no task before it is up: it may be one that finds no place for hours, or ever."""
        actor: Any = _ACTOR.options(**self._options).remote(self._threads)
        self._coming[actor.place.remote()] = worker
        return actor

    def _grow(self) -> None:
        """Workers for what has joined the cluster; those of nodes that left stay, and wait for a place."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            room = self._room()
        except (RayError, RuntimeError, ConnectionError):
            return  # the head does not answer; workers may well go on without it
        for worker in range(self.size, room):
            self._actors.append(self._spawn(worker))
            self.size += 1

    def waiting_for(self) -> str:
        try:
            return self._waiting_for()
        except (RayError, RuntimeError, ConnectionError):
            return "the cluster's head does not answer"

    def idle(self) -> list[int]:
        self._grow()
        if len(self._committing) >= _COMMITS_PER_WORKER * self.size:
            return []
        absent = self._working.keys() | set(self._coming.values())
        return [worker for worker in range(self.size) if worker not in absent]

    def start(self, worker: int, task: Task[Any]) -> None:
        # the name is part of the process's title, so that `ps` and `ray summary` show what a worker does
        call = self._actors[worker].run_task.options(name=f"ActorWorker.{task.kind}", num_returns=1 + task.outputs)
        refs = call.remote(task.job, *task.payloads)
        report, payloads = (refs[0], tuple(refs[1:])) if task.outputs else (refs, ())
        where = task.commit_to
        record = _COMMIT.remote(where.ticket, where.file, payloads[0]) if where else None
        self._working[worker] = _Flight(task, worker, report, payloads, record)

    def wait(self) -> TaskResult[Any] | None:
        flights = {flight.report: flight for flight in self._working.values()}
        flights |= {flight.record: flight for flight in self._committing}
        ready, _ = ray.wait([*flights, *self._coming], num_returns=1, timeout=_WAIT_SECONDS, fetch_local=False)
        if overdue := self._overdue():
            return overdue
        if not ready:
            return None
        if ready[0] in self._coming:
            self._arrived(ready[0])
            return None
        flight, ref = flights[ready[0]], ready[0]
        try:
            result = ray.get(ref)
        except RayError as error:
            return self._failed(flight, Phase.COMMIT if ref == flight.record else Phase.JOB, error)
        self._deaths = self._out_of_memory_in_a_row = 0
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
                self._replace(flight.worker, flight.task.label)
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
        limit, seconds = self._deadline or foreseen, time.monotonic() - flight.started
        return bool(limit and seconds > limit and not ray.wait([ref], timeout=0, fetch_local=False)[0])

    def _note_time(self, flight: _Flight, kind: str) -> None:
        seconds = time.monotonic() - flight.started
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _arrived(self, ref: Any) -> None:
        worker = self._coming.pop(ref)
        try:
            self._nodes[worker], device = ray.get(ref)
            gpu.require_gpu(self._device, device.nbytes)
            self._kind = gpu.require_kind(self._kind, device.kind)
            self.capabilities.add(device.capability)
        except RayTaskError as error:
            if isinstance(error.cause, SwscError):
                raise error.cause from None
            raise RunError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
        except RayError as error:
            self._replace(worker, f"start ({type(error).__name__})")

    def _failed(self, flight: _Flight, phase: Phase, error: RayError) -> TaskResult[Any]:
        """Carry out what follows from a failure."""
        worker, label = flight.worker, flight.task.label
        failure = classify(error, phase, label, phase is Phase.JOB and _is_gone(self._nodes[worker]))
        if phase is Phase.COMMIT:
            self._committing.remove(flight)
        else:
            del self._working[worker]
        if failure.replaces_worker:
            self._replace(worker, label if failure.blames_worker else "")
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

    def _replace(self, worker: int, at: str = "") -> None:
        """A new worker in the place of one; `at`: what this one died of, if it is to be blamed."""
        self._deaths += bool(at)
        if self._deaths > max(_DEATHS, _DEATHS_PER_WORKER * self.size):
            raise RunError(
                f"workers died {self._deaths} times in a row, the last one at {at}; look at their memory and GPUs"
            )
        ray.kill(self._actors[worker])
        self._actors[worker] = self._spawn(worker)

    def close(self) -> None:
        """End workers, and wait for commits under way: nothing is written after this."""
        try:
            for actor in self._actors:
                ray.kill(actor)
            pending = [flight.record for flight in (*self._committing, *self._working.values()) if flight.record]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_CLOSE_SECONDS, fetch_local=False)
        except RayError:
            pass  # Ray itself is gone; what made it so is on its way to the user
        if self._started_here:
            with interrupt.held():
                ray.shutdown()


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
