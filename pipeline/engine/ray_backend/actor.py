"""A worker as an actor of Ray, on the device that Ray gave it."""

from typing import Any

import ray

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import Device, take_device
from pipeline.engine.malloc import reset_peak_rss
from pipeline.engine.task import Job
from pipeline.engine.worker import Worker
from pipeline.errors import ClusterError

# Slabs of many sizes would leave holes in a GPU's memory; and cuBLAS is not to round factors, whatever a node's environment says.
GPU_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NVIDIA_TF32_OVERRIDE": "0"}


class ActorWorker(Worker):
    """A worker that finds its own device."""

    def __init__(self, threads: int) -> None:
        self._refusal: ClusterError | None = None
        try:
            device, self._about = take_device(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
            super().__init__(threads, device)
        except ClusterError as error:
            self._refusal = error  # what a constructor raises, Ray takes for a death like any other

    def run_task(self, job: Job[Any], *inputs: Payload) -> Any:
        """As Ray stores it: the value, followed by the payloads as objects of their own if there are any."""
        output = self.run(job, *inputs)
        return (output.value, *output.payloads) if output.payloads else output.value

    def begin_stage(self, keeps_model: bool) -> None:
        """Drop the loaded model unless the next stage loads models, too, and measure peak memory from here on."""
        if not keeps_model:
            self.forget_model()
        reset_peak_rss()

    def place(self) -> tuple[str, Device]:
        """Ray's name of the node that it is on, and its device. Raises ClusterError: one that is not fit for use."""
        if self._refusal:
            raise self._refusal
        return ray.get_runtime_context().get_node_id(), self._about
