"""Actors of Ray that serve all stages of a command.

Ray's own restarts are off (`max_restarts=0`, `max_task_retries=0`): they stay bound to the dead actor. A worker that died, hangs or
cannot use its GPU any more is replaced here.
"""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import device as gpu
from pipeline.engine.ray_backend.actor import ActorWorker
from pipeline.errors import RunError, SwscError

_DEATHS, _DEATHS_PER_WORKER = 30, 5  # in a row, without a task that ended well: the larger of both ends a run

_ACTOR = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(ActorWorker)


@dataclass
class RayWorkers:
    """Workers of one size, numbered from 0.

    Attributes:
        options: of each actor: CPUs, GPUs, memory.
        threads: of each worker.
        kind: of device that every worker must have; None: that of the first one.
        actors: worker -> its actor.
        coming: reference that is ready once a worker is up -> the worker.
        nodes: worker -> Ray's name of its node.
        devices: worker -> its device.
        deaths: of workers, since a task ended well.
    """

    options: dict[str, Any]
    threads: int
    kind: str | None = None
    actors: dict[int, Any] = field(default_factory=dict)
    coming: dict[Any, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    devices: dict[int, gpu.Device] = field(default_factory=dict)
    deaths: int = 0

    @property
    def size(self) -> int:
        """Number of workers, those that are not up yet included."""
        return len(self.actors)

    def grow_to(self, count: int) -> None:
        """Start workers until there are `count`."""
        for worker in range(count):
            if worker not in self.actors:
                self._spawn(worker)

    def _spawn(self, worker: int) -> None:
        """Start an actor. It gets no task before it is up: it may be one that finds no place for hours, or ever."""
        actor: Any = _ACTOR.options(**self.options).remote(self.threads)
        self.actors[worker] = actor
        self.coming[actor.place.remote()] = worker

    def up(self) -> list[int]:
        """Workers that may be given a task."""
        absent = set(self.coming.values())
        return sorted(self.actors.keys() - absent)

    def begin_stage(self, keeps_model: bool) -> None:
        """Prepare workers that served another stage; an actor does this before the first task that it is given afterwards."""
        for worker in self.up():
            self.actors[worker].begin_stage.remote(keeps_model)

    def arrived(self, ref: Any, device: int) -> None:
        """Note that a worker is up. Raises ClusterError if its GPU has not `device` bytes, or is of another kind than the others'."""
        worker = self.coming.pop(ref)
        try:
            self.nodes[worker], self.devices[worker] = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, SwscError):
                raise error.cause from None
            raise RunError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
        except RayError as error:
            self.replace(worker, f"start ({type(error).__name__})")
            return
        gpu.require_gpu_memory(device, self.devices[worker].nbytes)
        self.kind = gpu.require_same_kind(self.kind, self.devices[worker].kind)

    def replace(self, worker: int, at: str = "") -> None:
        """Start a new worker in place of one.

        Args:
            at: label of the task that this one died of, if it counts as a death.

        Raises:
            RunError: too many deaths in a row.
        """
        self.deaths += bool(at)
        if self.deaths > max(_DEATHS, _DEATHS_PER_WORKER * self.size):
            raise RunError(
                f"workers died {self.deaths} times in a row, the last one at {at}; look at their memory and GPUs"
            )
        self.stop(worker)
        self._spawn(worker)

    def stop(self, worker: int) -> None:
        """End a worker at once, whatever it does."""
        self.coming = {ref: other for ref, other in self.coming.items() if other != worker}
        ray.kill(self.actors.pop(worker))

    def stop_all(self) -> None:
        """End all workers."""
        try:
            for worker in list(self.actors):
                self.stop(worker)
        except RayError:
            pass  # Ray itself is gone; the error that says why is on its way to the user
