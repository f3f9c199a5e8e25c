"""Pools for the stages of one command, which share their workers.

Workers request the memory of the largest stage that is known from the start, if the cluster still holds as many of
them. Otherwise new workers are started for the first stage that needs larger ones, or that could have more of them if
they were smaller.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

import ray

from pipeline.engine import signals
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.memory import GPU, Room, WorkerMemory, largest, require_room
from pipeline.engine.ray_backend.arithmetic import probed_device
from pipeline.engine.ray_backend.cluster import (
    WorkerResources,
    alive_nodes,
    count_workers,
    cpu_room,
    local_memory,
    resources_of,
    waiting_for,
)
from pipeline.engine.ray_backend.connection import connect
from pipeline.engine.ray_backend.pool import RayPool, StageLimits
from pipeline.engine.ray_backend.workers import RayWorkers
from pipeline.engine.stage import Stage
from pipeline.engine.task import Pool
from pipeline.engine.worker import Worker
from pipeline.settings.cluster import ClusterSettings


def worker_pools(
    settings: ClusterSettings, later: Sequence[Stage] = (), optional: Sequence[Stage] = ()
) -> "LocalPools | RayPools":
    """Return pools for the stages of a command, local or on the cluster that `settings` names; a context manager.

    Args:
        settings: the cluster and the resources of its workers.
        later: stages that follow. The first stage fails if a worker of one of them does not fit.
        optional: stages that may turn out not to fit.
    """
    if settings.local:
        return LocalPools(settings, later)
    return RayPools(settings, later, largest(stage.memory for stage in (*later, *optional)))


def choose_resources(
    needed: WorkerResources, preferred: Iterable[WorkerResources | None], count: Callable[[WorkerResources], int]
) -> WorkerResources:
    """Choose the resources of the workers of a stage.

    Args:
        needed: the least that a worker needs.
        preferred: resources to use instead if they cover `needed` and the stage gets no fewer workers; the first match
            counts.
        count: returns how many workers of a size the stage gets.
    """
    least = count(needed)
    usable = (size for size in preferred if size is not None and size.covers(needed) and count(size) >= least)
    return next(usable, needed)


def without_devices(settings: ClusterSettings) -> ClusterSettings:
    """Return the settings for workers on the same cluster that use no GPU."""
    return settings.model_copy(update={"gpus_per_worker": 0.0, "gpu_type": None})


def capped_room(settings: ClusterSettings, kind: str, available: int) -> Room:
    """What a worker may hold of the `available` bytes of its device."""
    cap = settings.memory_per_worker
    return Room(kind, available if cap is None else min(available, int(cap * 2**30)))


class _CommandPools(ABC):
    """Pools that end with the command that entered them."""

    def __init__(self, settings: ClusterSettings, later: Sequence[Stage]) -> None:
        self._settings, self._later = settings, tuple(later)
        # Whether a stage uses no device -> room of its workers. Asking a cluster for its GPUs needs a free one.
        self._rooms: dict[bool, Room] = {}

    def room(self) -> Room:
        """What a worker may hold: by the settings, or else what there is."""
        return self.room_of(on_cpu=False)

    def room_of(self, on_cpu: bool) -> Room:
        """What a worker of a stage may hold that uses no device, or one."""
        if on_cpu not in self._rooms:
            settings = without_devices(self._settings) if on_cpu else self._settings
            self._rooms[on_cpu] = capped_room(settings, *self._available(settings))
        return self._rooms[on_cpu]

    def _require_room(self, stage: Stage) -> None:
        """Raise ClusterError if a worker of a stage, or of a later one, needs more than it may hold."""
        for each in (*self._later, stage):
            require_room(each.name, each.memory, self.room_of(each.on_cpu))

    @abstractmethod
    def _available(self, settings: ClusterSettings) -> tuple[str, int]:
        """torch's name of a worker's device, and the bytes of its memory."""

    @abstractmethod
    def count(self, tasks: int, memory: WorkerMemory) -> int:
        """Return how many workers a stage of `tasks` tasks would get. Raises ClusterError if the stage itself would."""

    @abstractmethod
    def release(self) -> None:
        """Stop the workers. The next stage starts new ones."""

    def close(self) -> None:
        """End everything that was started."""
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalPools(_CommandPools):
    """One worker in this process for all stages."""

    in_process = True

    def __init__(self, settings: ClusterSettings, later: Sequence[Stage] = ()) -> None:
        super().__init__(settings, later)
        # Device -> its worker.
        self._workers: dict[str, Worker] = {}

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """Return a pool for a stage of `tasks` tasks. Raises ClusterError if there is no GPU, or too little memory."""
        self.require_workers(stage)
        device = self.room_of(stage.on_cpu).kind
        if device not in self._workers:
            self._workers[device] = Worker(self._settings.threads_per_worker, device)
        if not stage.keeps_model:
            self._workers[device].forget_model()
        return LocalPool(self._workers[device])

    def require_workers(self, stage: Stage) -> None:
        """Raise ClusterError if there is no GPU, or too little memory."""
        self._require_room(stage)

    def _available(self, settings: ClusterSettings) -> tuple[str, int]:
        return local_memory(settings)

    def count(self, tasks: int, memory: WorkerMemory) -> int:
        return 1

    def release(self) -> None:
        """Drop the loaded model."""
        for worker in self._workers.values():
            worker.forget_model()


class RayPools(_CommandPools):
    """Ray workers that stay from stage to stage."""

    in_process = False

    def __init__(self, settings: ClusterSettings, later: Sequence[Stage], preferred: WorkerMemory) -> None:
        super().__init__(settings, later)
        self._preferred = preferred
        self._started_here = False
        self._resources: WorkerResources | None = None
        self._workers: RayWorkers | None = None

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """Return a pool for a stage of `tasks` tasks. The pool of the stage before must be closed.

        As many workers are started as fit. If the settings give a number of workers, the predicted memory is ignored.

        Raises:
            ClusterError: no cluster answers at the address, the cluster can never hold a worker, or a worker of this or
                of a later stage has too little memory.
        """
        settings = self._connected(stage)
        self._require_room(stage)
        resources = self._resources_for(settings, tasks, stage.memory)
        limits = StageLimits(
            partial(count_workers, settings, resources, tasks),
            partial(waiting_for, resources),
            settings.task_deadline,
            stage.memory.device,
        )
        return RayPool(self._workers_of(resources), limits, stage.keeps_model)

    def require_workers(self, stage: Stage) -> None:
        """Raise ClusterError if no cluster answers, it can never hold a worker, or a worker has too little memory."""
        settings = self._connected(stage)
        self._require_room(stage)
        self._resources_for(settings, 1, stage.memory)

    def _connected(self, stage: Stage) -> ClusterSettings:
        """Connect to the cluster, and return the settings of the workers of a stage."""
        self._started_here |= connect(self._settings.address)
        return without_devices(self._settings) if stage.on_cpu else self._settings

    def _resources_for(self, settings: ClusterSettings, tasks: int, memory: WorkerMemory) -> WorkerResources:
        nodes = alive_nodes()
        resources_of(settings, nodes, largest([memory, *(stage.memory for stage in self._later)]))
        needed = resources_of(settings, nodes, memory)
        # Nodes that an autoscaler adds may be too small for more memory than is needed.
        preferred = self._preferred.resident(GPU if needed.gpus else "cpu")
        usable = needed.memory and not settings.elastic
        enlarged = replace(needed, memory=max(needed.memory, preferred)) if usable else needed
        sizes = (self._resources, enlarged)
        return choose_resources(needed, sizes, lambda size: min(tasks, sum(map(size.fitting, nodes))))

    def _available(self, settings: ClusterSettings) -> tuple[str, int]:
        self._started_here |= connect(settings.address)
        nodes = alive_nodes()
        resources = resources_of(settings, nodes, WorkerMemory())
        if resources.gpus and (device := probed_device(replace(resources, memory=0))).nbytes:
            return GPU, device.nbytes
        return "cpu", cpu_room(settings, nodes)

    def count(self, tasks: int, memory: WorkerMemory) -> int:
        self._started_here |= connect(self._settings.address)
        return count_workers(self._settings, resources_of(self._settings, alive_nodes(), memory), tasks)

    def _workers_of(self, resources: WorkerResources) -> RayWorkers:
        if self._workers is None or self._resources != resources:
            self.release()
            self._workers = RayWorkers(resources.options(), self._settings.threads_per_worker)
            self._resources = resources
        return self._workers

    def release(self) -> None:
        """Stop the workers, so that another run can use their resources. The next stage starts new ones."""
        if self._workers:
            self._workers.stop_all()
        self._workers = self._resources = None

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        self.release()
        if self._started_here:
            with signals.deferred():
                ray.shutdown()
