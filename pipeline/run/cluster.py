"""The door to Ray: which cluster, and how many workers of which size it has room for."""

import os
import socket
from typing import Any

# Ray reads these when it is imported. A cluster that is started in this process listens on loopback only and needs no
# token; making one would leave a token file in the user's home that later clusters demand.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from pipeline.config import ClusterSettings
from pipeline.errors import ClusterError
from pipeline.run import interrupt
from pipeline.run.pool import LocalPool, Pool
from pipeline.run.ray_pool import RayPool
from pipeline.run.worker import Worker

_CONNECT_SECONDS = 10.0


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
    nodes = _nodes()
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

    def room_now() -> int:
        fitting = sum(_room(node, settings.cpus_per_worker, gpus, memory) for node in _nodes())
        return settings.workers or min(fitting, max(1, tasks))

    return RayPool(room_now, options, settings.threads_per_worker, started_here, settings.task_deadline)


def _nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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
