"""Pools for the stages of one command, which share their workers.

Workers get the memory of the largest stage that is known from the start, if the cluster then holds as many of them. Where it does not,
workers are started anew for the first stage that needs larger ones, or that could have more if they were smaller.
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

_CUDA_DEVICE = 1_000_000_000  # bytes of a GPU that CUDA's context and libraries take in each process


def worker_pools(settings: ClusterSettings, later: int = 0, largest: int = 0) -> "LocalPools | RayPools":
    """Pools for the stages of a command, local or on the cluster that `settings` names; a context manager.

    Args:
        later: memory in bytes that a worker needs in a later stage; a cluster that can never hold it is refused at the first stage.
        largest: the same, of a stage that does not have to fit.
    """
    return LocalPools(settings) if settings.local else RayPools(settings, later, max(later, largest))


def choose_resources(
    needed: WorkerResources, preferred: Iterable[WorkerResources | None], count: Callable[[WorkerResources], int]
) -> WorkerResources:
    """Resources of the workers of a stage: the first of those `preferred` that do and of which no fewer fit, else what is `needed`.

    Args:
        count: how many workers of a size the stage gets.
    """
    wanted = count(needed)
    fit = (one for one in preferred if one is not None and one.covers(needed) and count(one) >= wanted)
    return next(fit, needed)


def without_devices(settings: ClusterSettings) -> ClusterSettings:
    """The same cluster for work that touches no GPU."""
    return settings.model_copy(update={"gpus_per_worker": 0.0, "gpu_type": None})


def _device_bytes(stage: Stage) -> int:
    return stage.device + (_CUDA_DEVICE if stage.device else 0)


class _CommandPools(ABC):
    """Pools that end with the command which entered them."""

    @abstractmethod
    def release(self) -> None:
        """Stop the workers; the next stage starts new ones."""

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

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._workers: dict[str, Worker] = {}  # by device

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """A pool for a stage of so many tasks. Raises ClusterError for a GPU that is too small or not there."""
        import torch

        device = local_device(without_devices(self._settings) if stage.on_cpu else self._settings)
        require_gpu_memory(
            _device_bytes(stage), torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
        )
        if device not in self._workers:
            self._workers[device] = Worker(self._settings.threads_per_worker, device)
        if not stage.keeps_model:
            self._workers[device].forget_model()
        return LocalPool(self._workers[device])

    def release(self) -> None:
        """Drop the loaded model."""
        for worker in self._workers.values():
            worker.forget_model()


class RayPools(_CommandPools):
    """Workers of Ray that stay from stage to stage."""

    def __init__(self, settings: ClusterSettings, later: int, largest: int) -> None:
        self._settings, self._later, self._largest = settings, later, largest
        self._started_here = False
        self._resources: WorkerResources | None = None
        self._workers: RayWorkers | None = None

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        """A pool for a stage of so many tasks; the pool of the stage before must be closed.

        As many workers are started as fit; a number of workers that the user gave holds whatever memory is predicted.

        Raises:
            ClusterError: no cluster at the address, or one that can never hold a worker; a GPU that is too small.
        """
        settings = without_devices(self._settings) if stage.on_cpu else self._settings
        self._started_here |= connect(settings.address)
        resources = self._resources_for(settings, tasks, stage.memory)
        limits = StageLimits(
            partial(count_workers, settings, resources, tasks),
            partial(waiting_for, resources),
            settings.task_deadline,
            _device_bytes(stage),
        )
        return RayPool(self._workers_of(resources), limits, stage.keeps_model)

    def _resources_for(self, settings: ClusterSettings, tasks: int, memory: int) -> WorkerResources:
        nodes = alive_nodes()
        resources_of(settings, nodes, max(memory, self._later))
        needed = resources_of(settings, nodes, memory)
        # The nodes that an autoscaler may add are not known: they may be too small for more than is needed.
        extra = max(0, self._largest - memory) if needed.memory and not settings.elastic else 0
        preferred = (self._resources, replace(needed, memory=needed.memory + extra))
        return choose_resources(needed, preferred, lambda one: min(tasks, sum(map(one.fitting, nodes))))

    def _workers_of(self, resources: WorkerResources) -> RayWorkers:
        if self._workers is None or self._resources != resources:
            self.release()
            self._workers, self._resources = (
                RayWorkers(resources.options(), self._settings.threads_per_worker),
                resources,
            )
        return self._workers

    def release(self) -> None:
        """Stop the workers, so that another run gets what they take; the next stage starts new ones."""
        if self._workers:
            self._workers.stop_all()
        self._workers = self._resources = None

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        self.release()
        if self._started_here:
            with signals.deferred():
                ray.shutdown()
