"""What workers will calculate with, known before anything is begun: it is part of what makes two runs the same."""

import os
import time

import ray
from ray.exceptions import RayTaskError

from pipeline.console import log
from pipeline.device import Arithmetic, device_name, take_device
from pipeline.engine import signals
from pipeline.engine.ray_backend.cluster import WorkerResources, alive_nodes, local_device, resources_of, waiting_for
from pipeline.engine.ray_backend.connection import connect, joinable
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

_SECONDS_OF_PATIENCE = 20.0  # of waiting for a worker's device until a line says so


def arithmetic_of(settings: ClusterSettings) -> Arithmetic:
    """What the bytes of a run depend on beside its settings: threads of a worker, the kind of its device, torch.

    Where workers get GPUs of a cluster, one of them is asked.

    Raises:
        ClusterError: no cluster at the address, workers that do not fit it, GPUs of several kinds, one that torch cannot use.
    """
    return Arithmetic(settings.threads_per_worker, _device_kind(settings))


def _device_kind(settings: ClusterSettings) -> str:
    if settings.gpus_per_worker == 0:
        return "cpu"
    if settings.local:
        return device_name(local_device(settings))
    if not ray.is_initialized():
        where = joinable(settings.address or os.environ.get("RAY_ADDRESS"))
        if where is None:  # one will be started on this machine
            return device_name(local_device(settings))
        connect(where)
    need = resources_of(settings, alive_nodes(), 0)
    return _probed_kind(need) if need.gpus else "cpu"


def _probed_kind(need: WorkerResources) -> str:
    """The kind of device that a worker gets, as one says that is begun for this alone."""
    probe = ray.remote(max_retries=3)(take_device).options(**need.options())
    ref, patience = probe.remote(need.gpus), time.monotonic() + _SECONDS_OF_PATIENCE
    while not ray.wait([ref], timeout=1.0)[0]:
        signals.raise_if_interrupted()
        if time.monotonic() > patience:
            log(f"no worker is up yet, waiting for one: {waiting_for(need)}")
            patience = time.monotonic() + 6 * _SECONDS_OF_PATIENCE
    try:
        return str(ray.get(ref)[1].kind)
    except RayTaskError as error:
        if isinstance(error.cause, ClusterError):
            raise error.cause from None
        raise ClusterError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
