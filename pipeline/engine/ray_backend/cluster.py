"""Resources of a Ray cluster: how many workers of which size fit its nodes."""

import os
import sys
from dataclasses import dataclass, replace

# Ray reads these when it is imported. A cluster that is started in this process listens on loopback only and needs no
# token; creating one would leave a token file in the user's home directory that later clusters demand.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._common.utils import get_system_memory

from pipeline.engine.memory import GPU, WorkerMemory
from pipeline.engine.ray_backend.actor import GPU_ENVIRONMENT
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

# Prefix of the resources by which Ray names GPU models.
_GPU_TYPE = "accelerator_type:"
# Any share of such a resource places an actor on a node with that GPU model.
_GPU_TYPE_SHARE = 0.001


@dataclass(frozen=True)
class WorkerResources:
    """What one worker takes from its node.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs, or a fraction of one.
        memory: bytes of host memory; 0 if none are requested.
        gpu_type: Ray's name of the required GPU model; None for any.
    """

    cpus: float
    gpus: float
    memory: int = 0
    gpu_type: str | None = None

    def fitting(self, node: dict[str, float]) -> int:
        """Return how many workers fit a node; a worker never spans two."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, **self._type_resource}
        return min(int(node.get(name, 0) / amount) for name, amount in needed.items() if amount)

    def covers(self, other: "WorkerResources") -> bool:
        """Return whether a worker of this size can do the work of one of `other` size, on the same kind of device."""
        return replace(self, memory=0) == replace(other, memory=0) and self.memory >= other.memory

    def options(self) -> dict[str, object]:
        """Return the options of a Ray actor."""
        memory = {"memory": self.memory} if self.memory else {}
        environment = {"runtime_env": {"env_vars": GPU_ENVIRONMENT}} if self.gpus else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory, "resources": self._type_resource, **environment}

    @property
    def _type_resource(self) -> dict[str, float]:
        return {f"{_GPU_TYPE}{self.gpu_type}": _GPU_TYPE_SHARE} if self.gpu_type and self.gpus else {}

    def __str__(self) -> str:
        memory = f" and {self.memory / 1e9:.1f} GB of memory" if self.memory else ""
        kind = f" of type {self.gpu_type}" if self.gpu_type else ""
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{kind}{memory}"


def local_device(settings: ClusterSettings) -> str:
    """Return torch's name of the device of a worker on this machine.

    Raises:
        ClusterError: the settings request a GPU and torch finds none.
    """
    import torch

    if settings.gpus_per_worker == 0:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if settings.gpus_per_worker or settings.gpu_type:
        flag = "--gpus-per-worker" if settings.gpus_per_worker else "--gpu-type"
        raise ClusterError(
            f"{flag} requests a GPU, but torch finds none on this machine; remove the flag, or compute on CPUs by"
            " --gpus-per-worker 0"
        )
    return "cpu"


def local_memory(settings: ClusterSettings) -> tuple[str, int]:
    """Return torch's name of the device of a worker on this machine, and the bytes of its memory.

    There is no limit on a CPU if the settings give the number of workers.
    """
    import torch

    device = local_device(settings)
    if device == "cuda":
        return device, torch.cuda.get_device_properties(0).total_memory
    return device, sys.maxsize if settings.workers else int(get_system_memory())


def require_one_gpu_type(resources: WorkerResources, nodes: list[dict[str, float]]) -> None:
    """Raise ClusterError if workers could get GPUs of several models, whose results differ in their last bits."""
    types = sorted(
        {
            name.removeprefix(_GPU_TYPE)
            for node in nodes
            if resources.fitting(node)
            for name in node
            if name.startswith(_GPU_TYPE)
        }
    )
    if len(types) > 1 and resources.gpu_type is None:
        raise ClusterError(
            f"the cluster has GPUs of several models ({', '.join(types)}), whose results differ in their last bits;"
            " choose one by --gpu-type, or compute on CPUs by --gpus-per-worker 0"
        )


def resources_of(settings: ClusterSettings, nodes: list[dict[str, float]], memory: WorkerMemory) -> WorkerResources:
    """Return what a worker requests.

    Args:
        nodes: resources of the cluster's nodes.
        memory: what a worker is predicted to need.

    Raises:
        ClusterError: the cluster cannot hold the requested number of workers, and no autoscaler adds nodes.
    """
    gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(_most(nodes, "GPU") > 0)
    bare = WorkerResources(settings.cpus_per_worker, gpus, gpu_type=settings.gpu_type)
    _require_gpus(settings, bare, nodes)
    _require_capacity(settings, bare, nodes)
    host = memory.resident(GPU if gpus else "cpu")
    resources = bare if settings.workers else replace(bare, memory=host)
    if not settings.elastic and not any(map(resources.fitting, nodes)):
        raise ClusterError(
            f"a worker is predicted to need {host / 1e9:.1f} GB of memory, but the largest node offers Ray"
            f" {_most(nodes, 'memory') / 1e9:.1f} GB; use a larger node, or try it all the same by --workers 1"
        )
    return resources


def _require_gpus(settings: ClusterSettings, bare: WorkerResources, nodes: list[dict[str, float]]) -> None:
    if bare.gpus:
        require_one_gpu_type(bare, nodes)
    elif settings.gpu_type:
        raise ClusterError(
            f"--gpu-type {settings.gpu_type} requests GPUs, but workers get none ({_sum(nodes)}); remove the flag, or"
            " use nodes that have GPUs"
        )


def _require_capacity(settings: ClusterSettings, bare: WorkerResources, nodes: list[dict[str, float]]) -> None:
    capacity = sum(map(bare.fitting, nodes))
    if settings.elastic:
        if not capacity and settings.gpus_per_worker is None:
            raise ClusterError(
                "--elastic without a node for a worker: give the number of GPUs to request by --gpus-per-worker"
            )
    elif capacity < (settings.workers or 1):
        raise ClusterError(
            f"{settings.workers or 1} workers of {bare} do not fit the cluster, which has {_sum(nodes)}; lower"
            " --workers, --cpus-per-worker or --gpus-per-worker, or add --elastic if an autoscaler adds nodes"
        )


def count_workers(settings: ClusterSettings, resources: WorkerResources, tasks: int) -> int:
    """Return how many workers a stage may have now.

    With an autoscaler that is twice the capacity of the present nodes, because waiting workers make it add nodes.
    """
    capacity = sum(map(resources.fitting, alive_nodes()))
    return settings.workers or min(2 * max(1, capacity) if settings.elastic else capacity, max(1, tasks))


def cpu_room(settings: ClusterSettings, nodes: list[dict[str, float]]) -> int:
    """Return the bytes of resident memory that a worker on a CPU may hold at most.

    That is the memory of the largest node, so that fewer workers hold whole models. There is no limit if the settings
    give the number of workers, which then get what they find, or if an autoscaler may add larger nodes.
    """
    return sys.maxsize if settings.workers or settings.elastic else int(_most(nodes, "memory"))


def waiting_for(resources: WorkerResources) -> str:
    """Describe what each worker needs, and what the cluster has."""
    free = ray.available_resources()
    return (
        f"each needs {resources}, the cluster has {_sum(alive_nodes())},"
        f" {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of them free"
    )


def alive_nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(nodes: list[dict[str, float]]) -> str:
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"


def _most(nodes: list[dict[str, float]], resource: str) -> float:
    """The largest amount of a resource on one node."""
    return max((node.get(resource, 0) for node in nodes), default=0)
