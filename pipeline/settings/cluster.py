"""Settings of the workers and of the Ray cluster that they run on."""

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from pipeline.settings.validation import Option, Settings


class ClusterSettings(Settings):
    """Which cluster is used, how many workers run on it, and the resources of each."""

    groups: ClassVar[tuple[str, ...]] = ("workers and cluster",)
    address: Annotated[str | None, Option("ADDRESS", default="a cluster that runs on this machine, else local")] = (
        Field(None, description="Address of the Ray cluster; local starts one for this command.")
    )
    workers: Annotated[int | None, Option(default="as many as CPUs, GPUs and memory allow")] = Field(
        None, ge=1, description="Number of workers."
    )
    gpus_per_worker: Annotated[float | None, Option("F", default="1 if the cluster has GPUs, else 0")] = Field(
        None, ge=0, description="GPUs per worker, at most 1; 0.5 places two workers on a GPU, 0 computes on CPUs."
    )
    gpu_type: Annotated[str | None, Option("TYPE")] = Field(
        None, min_length=1, description="Ray's name of the GPU model to use (such as A100), if the cluster has several."
    )
    cpus_per_worker: Annotated[float, Option("F")] = Field(
        1, gt=0, description="CPU threads per worker. Results are bit-identical only for equal values."
    )
    memory_per_worker: Annotated[float | None, Option("GIB", default="what there is")] = Field(
        None,
        gt=0,
        description="Memory that a worker may hold: GPU memory if it has a GPU, else resident memory. A model that does"
        " not fit is loaded in blocks of layers.",
    )
    task_deadline: Annotated[
        float | None, Option("SECONDS", default="from the time of similar tasks, at least 600")
    ] = Field(None, gt=0, description="Time after which a task counts as hanging and its worker is replaced.")
    elastic: bool = Field(
        False,
        description="Request more workers than the cluster has room for, and wait for its autoscaler to add nodes.",
    )
    local: bool = Field(False, description="Run without Ray, in this process; the output is byte-identical.")

    @field_validator("gpus_per_worker")
    @classmethod
    def _require_one_gpu_at_most(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a worker computes on one GPU at most: choose 1 or less; more workers use more GPUs")
        return gpus

    @property
    def threads_per_worker(self) -> int:
        """Threads of a worker. The number is fixed because the last bit of LAPACK's results depends on it."""
        return max(1, int(self.cpus_per_worker))
