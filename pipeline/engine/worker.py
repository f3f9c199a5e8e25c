"""A worker: runs jobs on one device. `ActorWorker` runs it in a Ray actor; `LocalPool` calls it directly.

A worker belongs to no model and no run, because each job brings what it needs. Between jobs a worker keeps at most one
loaded model.
"""

from typing import TypeVar

import torch

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import fix_arithmetic
from pipeline.engine.task import Job, JobContext, JobOutput, ModelCache

V = TypeVar("V")


class Worker:
    """Runs jobs, one after the other, on one device."""

    def __init__(self, threads: int, device: str) -> None:
        """Set the number of CPU threads, which determines the last bit of LAPACK's results, and the GPU's precision.

        Raises:
            ClusterError: the GPU rounds products to TF32.
        """
        torch.set_num_threads(threads)
        fix_arithmetic(device)
        self.device, self.threads = device, threads
        self._models = ModelCache()

    def forget_model(self) -> None:
        """Drop the loaded model and free its memory."""
        self._models.clear()

    def run(self, job: Job[V], *inputs: Payload) -> JobOutput[V]:
        """Run one job on the payloads that it needs."""
        return job.run(JobContext(self.device, self.threads, self._models, inputs))
