"""The kind of device that workers will get, determined before a run because it is part of an output's identity."""

import os
import time

import ray
from ray.exceptions import RayTaskError

from pipeline.console import log
from pipeline.device import Arithmetic, Device, device_name, take_device
from pipeline.engine import signals
from pipeline.engine.memory import CUDA
from pipeline.engine.ray_backend.cluster import WorkerResources, alive_nodes, local_device, resources_of, waiting_for
from pipeline.engine.ray_backend.connection import connect, joinable
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

# Seconds without a worker until a line reports it, and the factor for the time between further lines.
_PATIENCE_SECONDS, _LONGER = 20.0, 6


def arithmetic_of(settings: ClusterSettings) -> Arithmetic:
    """Return what the bytes of an output depend on besides the settings: threads, kind of device, version of torch.

    If workers get GPUs of a cluster, one worker is started to find out their model.

    Raises:
        ClusterError: no cluster answers at the address, the workers do not fit it, it has GPUs of several models, or
            torch cannot use a GPU.
    """
    return Arithmetic(settings.threads_per_worker, _device_kind(settings))


def _device_kind(settings: ClusterSettings) -> str:
    if settings.gpus_per_worker == 0:
        return "cpu"
    if settings.local:
        return device_name(local_device(settings))
    if not ray.is_initialized():
        address = joinable(settings.address or os.environ.get("RAY_ADDRESS"))
        # Without an address, a cluster will be started on this machine.
        if address is None:
            return device_name(local_device(settings))
        connect(address)
    resources = resources_of(settings, alive_nodes(), CUDA)
    return probed_device(resources).kind if resources.gpus else "cpu"


def probed_device(resources: WorkerResources) -> Device:
    """Start a task with a worker's resources, and return the device that it gets."""
    probe = ray.remote(max_retries=3)(take_device).options(**resources.options())
    ref, patience = probe.remote(resources.gpus), time.monotonic() + _PATIENCE_SECONDS
    while not ray.wait([ref], timeout=1.0)[0]:
        signals.raise_if_interrupted()
        if time.monotonic() > patience:
            log(f"no worker is up yet, waiting for one: {waiting_for(resources)}")
            patience = time.monotonic() + _LONGER * _PATIENCE_SECONDS
    try:
        device: Device = ray.get(ref)[1]
        return device
    except RayTaskError as error:
        if isinstance(error.cause, ClusterError):
            raise error.cause from None
        raise ClusterError(f"a worker cannot start: {' '.join(str(error.cause).split())}") from None
