"""Pools for the stages of one command, which share their workers.

Workers request the memory of the largest stage that is known from the start, if the cluster still holds as many of
them. Otherwise new workers are started for the first stage that needs larger ones, or that could have more of them if
they were smaller.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

import ray

from pipeline.device import require_gpu_memory
from pipeline.engine import signals
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.ray_backend.cluster import (
    WorkerResources,
    alive_nodes,
    count_workers,
    local_device,
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

# Bytes of a GPU that CUDA's context and libraries take in each process.
_CUDA_DEVICE = 1_000_000_000


def worker_pools(
    settings: ClusterSettings, peak_memory_later: int = 0, peak_memory_optional: int = 0
) -> "LocalPools | RayPools":
    """Return pools for the stages of a command, local or on the cluster that `settings` names; a context manager.

    Args:
        settings: the cluster and the resources of its workers.
        peak_memory_later: bytes of host memory that a worker needs in some later stage. The first stage fails if the
            cluster can never hold such a worker.
        peak_memory_optional: bytes that a worker needs in a stage that may turn out not to fit.
    """
    if settings.local:
        return LocalPools(settings)
    return RayPools(settings, peak_memory_later, max(peak_memory_later, peak_memory_optional))


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


def _device_bytes(stage: Stage) -> int:
    return stage.device + (_CUDA_DEVICE if stage.device else 0)


class _CommandPools(ABC):
    """Pools that end with the command that entered them."""

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

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        # Device -> its worker.
        self._workers: dict[str, Worker] = {}

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """Return a pool for a stage of `tasks` tasks. Raises ClusterError if there is no GPU, or it is too small."""
        device = self._device_for(stage)
        if device not in self._workers:
            self._workers[device] = Worker(self._settings.threads_per_worker, device)
        if not stage.keeps_model:
            self._workers[device].forget_model()
        return LocalPool(self._workers[device])

    def require_workers(self, stage: Stage) -> None:
        """Raise ClusterError if there is no GPU, or it is too small."""
        self._device_for(stage)

    def _device_for(self, stage: Stage) -> str:
        import torch

        device = local_device(without_devices(self._settings) if stage.on_cpu else self._settings)
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
        require_gpu_memory(_device_bytes(stage), gpu_bytes)
        return device

    def release(self) -> None:
        """Drop the loaded model."""
        for worker in self._workers.values():
            worker.forget_model()


class RayPools(_CommandPools):
    """Ray workers that stay from stage to stage."""

    in_process = False

    def __init__(self, settings: ClusterSettings, peak_memory_later: int, preferred_memory: int) -> None:
        self._settings = settings
        self._peak_memory_later, self._preferred_memory = peak_memory_later, preferred_memory
        self._started_here = False
        self._resources: WorkerResources | None = None
        self._workers: RayWorkers | None = None

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """Return a pool for a stage of `tasks` tasks. The pool of the stage before must be closed.

        As many workers are started as fit. If the settings give a number of workers, the predicted memory is ignored.

        Raises:
            ClusterError: no cluster answers at the address, the cluster can never hold a worker, or a GPU is too small.
        """
        settings = self._connected(stage)
        resources = self._resources_for(settings, tasks, stage.memory)
        limits = StageLimits(
            partial(count_workers, settings, resources, tasks),
            partial(waiting_for, resources),
            settings.task_deadline,
            _device_bytes(stage),
        )
        return RayPool(self._workers_of(resources), limits, stage.keeps_model)

    def require_workers(self, stage: Stage) -> None:
        """Raise ClusterError if no cluster answers at the address, or it can never hold a worker."""
        self._resources_for(self._connected(stage), 1, stage.memory)

    def _connected(self, stage: Stage) -> ClusterSettings:
        """Connect to the cluster, and return the settings of the workers of a stage."""
        self._started_here |= connect(self._settings.address)
        return without_devices(self._settings) if stage.on_cpu else self._settings

    def _resources_for(self, settings: ClusterSettings, tasks: int, memory: int) -> WorkerResources:
        nodes = alive_nodes()
        resources_of(settings, nodes, max(memory, self._peak_memory_later))
        needed = resources_of(settings, nodes, memory)
        # Nodes that an autoscaler adds may be too small for more memory than is needed.
        extra = max(0, self._preferred_memory - memory) if needed.memory and not settings.elastic else 0
        preferred = (self._resources, replace(needed, memory=needed.memory + extra))
        return choose_resources(needed, preferred, lambda size: min(tasks, sum(map(size.fitting, nodes))))

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
