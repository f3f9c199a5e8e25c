"""Ray actors that serve all stages of a command.

Ray's own restarts are off (`max_restarts=0`, `max_task_retries=0`), because they stay bound to the dead actor. This
module replaces a worker that died, hangs or can no longer use its GPU.
"""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.device import Device, require_gpu_memory, require_same_kind
from pipeline.engine.ray_backend.actor import ActorWorker
from pipeline.errors import RunError, SwscError

# Deaths of workers in a row, without a task that succeeded, that end a run: the larger of the two numbers counts.
_MAX_DEATHS, _MAX_DEATHS_PER_WORKER = 30, 5

_ACTOR = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(ActorWorker)


@dataclass
class RayWorkers:
    """Workers of one size, numbered from 0.

    Attributes:
        options: Ray's options of each actor: CPUs, GPUs, memory.
        threads: CPU threads of each worker.
        kind: kind of device that every worker must have; None until the first worker is up.
        actors: worker -> its actor.
        starting: reference that is ready once a worker is up -> the worker.
        nodes: worker -> Ray's id of its node.
        devices: worker -> its device.
        deaths: deaths of workers since the last task that succeeded.
    """

    options: dict[str, object]
    threads: int
    kind: str | None = None
    actors: dict[int, Any] = field(default_factory=dict)
    starting: dict[Any, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    devices: dict[int, Device] = field(default_factory=dict)
    deaths: int = 0

    @property
    def size(self) -> int:
        """Number of workers, including those that have not started yet."""
        return len(self.actors)

    def grow_to(self, count: int) -> None:
        """Start workers until there are `count`."""
        for worker in range(count):
            if worker not in self.actors:
                self._spawn(worker)

    def _spawn(self, worker: int) -> None:
        """Create an actor. It gets no task before it is up, because Ray may not place it for hours, or ever."""
        actor: Any = _ACTOR.options(**self.options).remote(self.threads)
        self.actors[worker] = actor
        self.starting[actor.place.remote()] = worker

    def up(self) -> list[int]:
        """Return the workers that have started."""
        return sorted(self.actors.keys() - set(self.starting.values()))

    def begin_stage(self, keeps_model: bool) -> None:
        """Prepare the running workers for a new stage.

        An actor does this before the first task that it gets afterwards.
        """
        for worker in self.up():
            self.actors[worker].begin_stage.remote(keeps_model)

    def on_started(self, ref: Any, device: int) -> None:
        """Register a worker that is up.

        Args:
            ref: its reference in `starting`.
            device: bytes that the stage needs on a GPU.

        Raises:
            ClusterError: its GPU is too small, or its device is of another kind than those of the other workers.
            RunError: its constructor failed.
        """
        worker = self.starting.pop(ref)
        try:
            self.nodes[worker], self.devices[worker] = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, SwscError):
                raise error.cause from None
            raise RunError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
        except RayError as error:
            self.replace(worker, f"start ({type(error).__name__})")
            return
        require_gpu_memory(device, self.devices[worker].nbytes)
        self.kind = require_same_kind(self.kind, self.devices[worker].kind)

    def replace(self, worker: int, task: str = "") -> None:
        """Stop a worker and start a new one in its place.

        Args:
            worker: number of the worker.
            task: label of the task during which it died; "" if this does not count as a death.

        Raises:
            RunError: too many workers died in a row.
        """
        self.deaths += bool(task)
        if self.deaths > max(_MAX_DEATHS, _MAX_DEATHS_PER_WORKER * self.size):
            raise RunError(
                f"workers died {self.deaths} times in a row, the last one during {task}; check the memory and GPUs of"
                " the nodes"
            )
        self.stop(worker)
        self._spawn(worker)

    def stop(self, worker: int) -> None:
        """End a worker at once, even while it runs a task."""
        self.starting = {ref: other for ref, other in self.starting.items() if other != worker}
        ray.kill(self.actors.pop(worker))

    def stop_all(self) -> None:
        """End all workers."""
        try:
            for worker in list(self.actors):
                self.stop(worker)
        except RayError:
            # Ray itself has ended. The error that ended the run names the cause.
            pass
