"""A worker: runs jobs on one device. `actor.ActorWorker` wraps it in an actor, `local_pool.LocalPool` calls it directly.

A worker belongs to no model and no run: each job brings what it needs. Between two jobs a worker keeps at most one loaded model.
"""

import gc
from typing import TypeVar

import torch

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import fix_arithmetic
from pipeline.engine.task import Job, JobContext, JobOutput, ModelSlot

V = TypeVar("V")


class Worker:
    """Runs jobs, one after the other, on one device."""

    def __init__(self, threads: int, device: str) -> None:
        """Fix the number of `threads`, which LAPACK's last bit depends on. Raises ClusterError for a GPU that rounds to TF32."""
        torch.set_num_threads(threads)
        fix_arithmetic(device)
        self.device, self.threads = device, threads
        self._models = ModelSlot()

    def forget_model(self) -> None:
        """Drop the loaded model and free its memory."""
        if self._models.clear():
            gc.collect()  # modules of transformers hold each other; it takes 0.2 s, so not without need

    def run(self, job: Job[V], *inputs: Payload) -> JobOutput[V]:
        """Run one job, with the payloads that it needs."""
        return job.run(JobContext(self.device, self.threads, self._models, inputs))
