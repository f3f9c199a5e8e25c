"""The door to Ray: which cluster, and how many workers of which size it has room for."""

import os
from dataclasses import dataclass, replace
from typing import Any

# Ray reads these when it is imported. A cluster that is started in this process listens on loopback only and needs no
# token; making one would leave a token file in the user's home that later clusters demand.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from pipeline.engine.ray_backend.actor import GPU_ENVIRONMENT
from pipeline.engine.ray_backend.connection import connect as _connect
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

_TYPE = "accelerator_type:"  # how Ray's names of resources begin that stand for models of GPUs
_CUDA_HOST = 2_500_000_000  # bytes of host memory that CUDA's libraries take in each process


@dataclass(frozen=True)
class WorkerResources:
    """What one worker takes of a node."""

    cpus: float
    gpus: float
    memory: int = 0  # bytes; 0: not asked for
    gpu_type: str | None = None  # as Ray calls it

    def fitting(self, node: dict[str, float]) -> int:
        """Workers that fit one node: none ever spans two."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, **self._type}
        return min(int(node.get(name, 0) / amount) for name, amount in wanted.items() if amount)

    def covers(self, other: "WorkerResources") -> bool:
        """Whether a worker of this size may do what one of the `other` size is meant for, on the same kind of device."""
        return replace(self, memory=0) == replace(other, memory=0) and self.memory >= other.memory

    def options(self) -> dict[str, Any]:
        """As Ray's actors want to be told."""
        memory = {"memory": self.memory} if self.memory else {}
        environment = {"runtime_env": {"env_vars": GPU_ENVIRONMENT}} if self.gpus else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory, "resources": self._type, **environment}

    @property
    def _type(self) -> dict[str, float]:
        """A node with a GPU of the type has one of this resource, of which any share will do."""
        return {f"{_TYPE}{self.gpu_type}": 0.001} if self.gpu_type and self.gpus else {}

    def __str__(self) -> str:
        memory = f" and {self.memory / 1e9:.1f} GB of memory" if self.memory else ""
        kind = f" of type {self.gpu_type}" if self.gpu_type else ""
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{kind}{memory}"


def local_device(settings: ClusterSettings) -> str:
    """torch's name of the device of a worker on this machine; ClusterError if a GPU was asked for and there is none."""
    import torch

    if settings.gpus_per_worker == 0:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if settings.gpus_per_worker or settings.gpu_type:
        flag = "--gpus-per-worker" if settings.gpus_per_worker else "--gpu-type"
        raise ClusterError(
            f"{flag} asks for a GPU, and torch finds none on this machine; leave it out, or calculate on CPUs by"
            " --gpus-per-worker 0"
        )
    return "cpu"


def _require_one_type(need: WorkerResources, nodes: list[dict[str, float]]) -> None:
    """Raise ClusterError if workers may get GPUs of several models: their bytes would differ."""
    types = sorted(
        {name.removeprefix(_TYPE) for node in nodes if need.fitting(node) for name in node if name.startswith(_TYPE)}
    )
    if len(types) > 1 and need.gpu_type is None:
        raise ClusterError(
            f"the cluster has GPUs of several models ({', '.join(types)}), whose bytes differ: choose one by --gpu-type, or"
            " calculate on CPUs by --gpus-per-worker 0"
        )


def workers_for(settings: ClusterSettings, tasks: int, memory: int, later: int = 0) -> int:
    """How many workers a stage of so many tasks would get; raises ClusterError as it would."""
    started_here = _connect(settings.address)
    try:
        resources_of(settings, alive_nodes(), max(memory, later))
        return count_workers(settings, resources_of(settings, alive_nodes(), memory), tasks)
    finally:
        if started_here:
            ray.shutdown()


def resources_of(settings: ClusterSettings, nodes: list[dict[str, float]], memory: int) -> WorkerResources:
    """What a worker asks for. Raises ClusterError if the cluster cannot hold as many as were asked for, and will not grow."""
    gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(_most(nodes, "GPU") > 0)
    bare = WorkerResources(settings.cpus_per_worker, gpus, gpu_type=settings.gpu_type)
    if gpus:
        _require_one_type(bare, nodes)
    elif settings.gpu_type:
        raise ClusterError(
            f"--gpu-type {settings.gpu_type} asks for GPUs, and workers get none ({_sum(nodes)}); leave it out, or use nodes that"
            " have some"
        )
    room = sum(map(bare.fitting, nodes))
    if settings.elastic:
        if not room and settings.gpus_per_worker is None:
            raise ClusterError(
                "--elastic, and no node for a worker yet: say how many GPUs to ask for by --gpus-per-worker"
            )
    elif room < (settings.workers or 1):
        raise ClusterError(
            f"{settings.workers or 1} workers of {bare} do not fit the cluster, which has {_sum(nodes)};"
            " lower --workers, --cpus-per-worker or --gpus-per-worker, or say --elastic if an autoscaler is to add nodes"
        )
    memory += _CUDA_HOST if gpus else 0
    need = bare if settings.workers else replace(bare, memory=memory)
    if not settings.elastic and not any(map(need.fitting, nodes)):
        raise ClusterError(
            f"a worker is foretold to need {memory / 1e9:.1f} GB of memory, the largest node offers Ray"
            f" {_most(nodes, 'memory') / 1e9:.1f} GB; use a larger node, or --workers 1 to try it all the same"
        )
    return need


def count_workers(settings: ClusterSettings, need: WorkerResources, tasks: int) -> int:
    """How many there may be now. An autoscaler adds nodes for workers that wait, so as many again are asked for of it."""
    room = sum(map(need.fitting, alive_nodes()))
    return settings.workers or min(2 * max(1, room) if settings.elastic else room, max(1, tasks))


def waiting_for(need: WorkerResources) -> str:
    free = ray.available_resources()
    return (
        f"each needs {need}, the cluster has {_sum(alive_nodes())},"
        f" {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of them free"
    )


def alive_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(nodes: list[dict[str, float]]) -> str:
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"


def _most(nodes: list[dict[str, float]], resource: str) -> float:
    """What the best node has of a resource."""
    return max((node.get(resource, 0) for node in nodes), default=0)
