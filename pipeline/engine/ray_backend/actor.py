"""A worker as a Ray actor, on the device that Ray assigned to it."""

from typing import Any

import ray

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import Device, take_device
from pipeline.engine.malloc import reset_peak_rss
from pipeline.engine.task import Job
from pipeline.engine.worker import Worker
from pipeline.errors import ClusterError

# Slabs of many sizes would fragment a GPU's memory, and cuBLAS must not round factors, whatever a node's environment
# sets.
GPU_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NVIDIA_TF32_OVERRIDE": "0"}


class ActorWorker(Worker):
    """A worker that asks Ray for its device."""

    def __init__(self, threads: int) -> None:
        self._unusable: ClusterError | None = None
        try:
            device, self._device_info = take_device(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
            super().__init__(threads, device)
        except ClusterError as error:
            # An exception of the constructor would look like the death of the actor; `place` raises this one.
            self._unusable = error

    def run_task(self, job: Job[Any], *inputs: Payload) -> Any:
        """Run a job.

        Returns its value or, if it has payloads, a tuple of the value and the payloads, which Ray stores one by one.
        """
        output = self.run(job, *inputs)
        return (output.value, *output.payloads) if output.payloads else output.value

    def begin_stage(self, keeps_model: bool) -> None:
        """Drop the loaded model unless the stage keeps it, and measure peak memory from here on."""
        if not keeps_model:
            self.forget_model()
        reset_peak_rss()

    def place(self) -> tuple[str, Device]:
        """Return Ray's id of the node, and the device.

        Raises:
            ClusterError: the device is unusable.
        """
        if self._unusable:
            raise self._unusable
        return ray.get_runtime_context().get_node_id(), self._device_info
