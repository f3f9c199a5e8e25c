"""The door to Ray: workers as actors, payloads as objects, commits as tasks beside the objects.

Ray's own retries are off (`max_restarts=0`, `max_task_retries=0`): they stay bound to the dead actor. A dead worker is
replaced here, and the driver decides about its task.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

# Ray reads these when it is imported. A cluster that is started in this process listens on loopback only and needs no
# token; making one would leave a token file in the user's home that later clusters demand.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from pipeline.config import ClusterSettings
from pipeline.errors import ClusterError, RunError, WorkerLost
from pipeline.model.parts import commit
from pipeline.run import interrupt
from pipeline.run.pool import Done, LocalPool, Pool, Task, as_swsc_error
from pipeline.run.worker import Worker

_WAIT_SECONDS = 1.0
_COMMITS_PER_WORKER = 2  # payloads waiting to be written; bounds what lies in the object store
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 30.0  # longest wait for commits under way
_RESPAWNS_PER_WORKER = 5


class ActorWorker(Worker):
    """A worker that finds its own device."""

    def __init__(self, threads: int) -> None:
        import torch

        super().__init__(threads, "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


_ACTOR = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(ActorWorker)
_COMMIT = ray.remote(num_cpus=0, max_retries=3)(commit)  # no CPU: workers hold them all, and it must not wait for one


def make_pool(settings: ClusterSettings, tasks: int, memory: int) -> Pool:
    """A pool for `tasks` tasks: local, or actors on the cluster that `settings` names.

    `memory`: bytes that a worker is foretold to need. As many workers are made as fit; a number of workers that the
    user gave stands whatever the forecast says.

    Raises:
        ClusterError: no cluster at the address, or one that can never hold a worker.
    """
    if settings.local:
        import torch

        on_gpu = torch.cuda.is_available() and settings.gpus_per_worker != 0
        return LocalPool(Worker(settings.threads_per_worker, "cuda" if on_gpu else "cpu"))
    started_here = _connect(settings.address)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(_most(nodes, "GPU") > 0)
    options = {"num_cpus": settings.cpus_per_worker, "num_gpus": gpus}
    wanted, room = settings.workers or 1, sum(_room(node, settings.cpus_per_worker, gpus) for node in nodes)
    if room < wanted:
        raise ClusterError(
            f"{wanted} workers of {settings.cpus_per_worker:g} CPUs and {gpus:g} GPUs do not fit the cluster, which has"
            f" {sum(node.get('CPU', 0) for node in nodes):g} CPUs and {sum(node.get('GPU', 0) for node in nodes):g} GPUs"
            f" on {len(nodes)} nodes; lower --workers, --cpus-per-worker or --gpus-per-worker"
        )
    if settings.workers is None:
        options["memory"] = memory
        room = sum(_room(node, settings.cpus_per_worker, gpus, memory) for node in nodes)
    if room == 0:
        raise ClusterError(
            f"a worker is foretold to need {memory / 1e9:.1f} GB of memory, the largest node offers Ray"
            f" {_most(nodes, 'memory') / 1e9:.1f} GB; use a larger node, or --workers 1 to try it all the same"
        )
    size = settings.workers or min(room, max(1, tasks))
    return RayPool(size, options, settings.threads_per_worker, started_here)


def _room(resources: dict[str, float], cpus: float, gpus: float, memory: int = 0) -> int:
    """Workers that fit one node: none ever spans two."""
    wanted = {"CPU": cpus, "GPU": gpus, "memory": memory}
    return min(int(resources.get(name, 0) / amount) for name, amount in wanted.items() if amount)


def _most(nodes: list[dict[str, float]], resource: str) -> float:
    """What the best node has of a resource."""
    return max(node.get(resource, 0) for node in nodes)


def _connect(address: str | None) -> bool:
    """Connect to the cluster named, to the one of this job or this machine, or start one; True if started here."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if ray.is_initialized():
        return False
    started_here = False
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    _require_listener(where)
    try:
        if address != "local" and (address or "RAY_ADDRESS" in os.environ):
            ray.init(address=address, **quiet)
        elif address == "local" or not _found_local_cluster(quiet):
            started_here = True
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(
            f"no Ray cluster at {where}: {reason}; check --address, RAY_ADDRESS and RAY_AUTH_MODE"
        ) from None
    interrupt.listen()  # after Ray, which installs a handler of its own
    return started_here


def _require_listener(address: str) -> None:
    """Raise ClusterError if nobody listens at host:port: Ray itself would try for minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(f"no Ray cluster at {address}: {reason}; check --address and RAY_ADDRESS") from None


def _found_local_cluster(quiet: dict[str, Any]) -> bool:
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        return False
    return True


@dataclass
class _Flight:
    """A task under way: first its method (`report`), then, if it is to be written, its commit."""

    task: Task
    worker: int
    report: Any
    payloads: tuple[Any, ...]
    record: Any
    value: Any = None


class RayPool:
    """Actors of Ray, one task at a time each."""

    def __init__(self, size: int, options: dict[str, float], threads: int, started_here: bool) -> None:
        self.size = size
        self._options = options
        self._threads = threads
        self._started_here = started_here
        self._coming: dict[Any, int] = {}  # what tells that a worker is up -> the worker
        self._actors = [self._spawn(worker) for worker in range(size)]
        self._working: dict[int, _Flight] = {}
        self._committing: list[_Flight] = []
        self._respawns = 0

    def _spawn(self, worker: int) -> Any:
        """A new actor. It gets no task before it is up: it may be one that finds no place for hours, or ever."""
        actor: Any = _ACTOR.options(**self._options).remote(self._threads)
        self._coming[actor.__ray_ready__.remote()] = worker
        return actor

    def idle(self) -> list[int]:
        if len(self._committing) >= _COMMITS_PER_WORKER * self.size:
            return []
        absent = self._working.keys() | set(self._coming.values())
        return [worker for worker in range(self.size) if worker not in absent]

    def start(self, worker: int, task: Task) -> None:
        method = getattr(self._actors[worker], task.method)
        refs = method.options(num_returns=1 + task.outputs).remote(*task.args, *task.payloads)
        report, payloads = (refs[0], tuple(refs[1:])) if task.outputs else (refs, ())
        record = _COMMIT.remote(*task.commit_to, payloads[0]) if task.commit_to else None
        self._working[worker] = _Flight(task, worker, report, payloads, record)

    def wait(self) -> Done | None:
        flights = {flight.report: flight for flight in self._working.values()}
        flights |= {flight.record: flight for flight in self._committing}
        ready, _ = ray.wait([*flights, *self._coming], num_returns=1, timeout=_WAIT_SECONDS, fetch_local=False)
        if not ready:
            return None
        if ready[0] in self._coming:
            self._arrived(ready[0])
            return None
        flight, ref = flights[ready[0]], ready[0]
        try:
            result = ray.get(ref)
        except RayError as error:
            return self._failed(flight, ref, error)
        if ref is flight.record:
            self._committing.remove(flight)
            return Done(flight.task, flight.value, (), result, worker=flight.worker)
        del self._working[flight.worker]
        flight.value = result
        if flight.record is None:
            return Done(flight.task, result, flight.payloads, worker=flight.worker)
        flight.payloads = ()  # the commit holds the payload now; it is freed when the commit is done
        self._committing.append(flight)
        return None

    def _arrived(self, ref: Any) -> None:
        worker = self._coming.pop(ref)
        try:
            ray.get(ref)
        except RayTaskError as error:
            raise RunError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
        except RayError as error:
            self._replace(worker, f"start ({type(error).__name__})")

    def _failed(self, flight: _Flight, ref: Any, error: RayError) -> Done:
        """An error of the task's own, or of Ray: then the process, its node or an object is gone, and it may run again."""
        own = error.cause if isinstance(error, RayTaskError) and not isinstance(error, ObjectLostError) else None
        if ref is flight.record:
            self._committing.remove(flight)
        else:
            del self._working[flight.worker]
            if own is None:
                self._replace(flight.worker, flight.task.label)
        if own is not None:
            return Done(flight.task, error=as_swsc_error(own, flight.task), worker=flight.worker)
        lost = WorkerLost(f"{flight.task.label}: {type(error).__name__}")
        return Done(flight.task, error=lost, worker=flight.worker)

    def _replace(self, worker: int, at: str) -> None:
        self._respawns += 1
        if self._respawns > _RESPAWNS_PER_WORKER * self.size:
            raise RunError(f"workers died {self._respawns} times, the last one at {at}; look at their memory and GPUs")
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
            ray.shutdown()
