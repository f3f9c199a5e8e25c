"""What the failure of a task under Ray means: a pure decision; `ray_pool` carries out what follows from it."""

from dataclasses import dataclass
from enum import Enum, auto

from ray.exceptions import ObjectLostError, OutOfDiskError, RayError, RayTaskError

from pipeline import device as gpu
from pipeline.engine.task import as_swsc_error
from pipeline.errors import DiskFull, NodeLost, PayloadLost, SwscError, WorkerLost, first_line


class Phase(Enum):
    """The two parts of a task: its job on a worker, then the commit of a payload, which is a process of its own."""

    JOB = auto()
    COMMIT = auto()


class Cause(Enum):
    """Why a task failed."""

    ERROR = auto()  # the job or the commit raised; the worker is sound
    GPU_MEMORY = auto()  # the memory of the GPU was too small; another process may have had it
    DISK_FULL = auto()  # the disk that Ray moves objects to
    INPUT_LOST = auto()  # an input payload, with its node
    NODE_LOST = auto()  # the worker's node
    WORKER_LOST = auto()  # the worker's process died, or cannot use its GPU any more
    COMMIT_LOST = auto()  # the process of the commit, or the payload that it was to write


@dataclass(frozen=True)
class Failure:
    """What happened, and the error that the driver gets. WorkerLost and NodeLost say that the task may run again."""

    cause: Cause
    error: SwscError

    @property
    def replaces_worker(self) -> bool:
        """Whether the worker's process is gone, or must go."""
        return self.cause in (Cause.GPU_MEMORY, Cause.NODE_LOST, Cause.WORKER_LOST)

    @property
    def blames_worker(self) -> bool:
        """Whether it counts as one of the deaths of workers that end a run."""
        return self.cause is Cause.WORKER_LOST


def classify(error: RayError, phase: Phase, label: str, node_is_gone: bool) -> Failure:
    """The meaning of `error`, which Ray raised for the task `label`; `node_is_gone`: the worker's node is known to be dead."""
    raised = error.cause if isinstance(error, RayTaskError) and not isinstance(error, ObjectLostError) else None
    if isinstance(error, OutOfDiskError) or isinstance(raised, OutOfDiskError):
        full = f"{label}: the disk that Ray moves objects to is full on a node; make room there"
        return Failure(Cause.DISK_FULL, DiskFull(full))
    if isinstance(raised, BaseException) and gpu.is_out_of_memory(raised):
        return Failure(Cause.GPU_MEMORY, as_swsc_error(raised, label))
    if isinstance(raised, BaseException) and not gpu.requires_new_process(raised):
        return Failure(Cause.ERROR, as_swsc_error(raised, label))
    reason = f"{type(raised).__name__}: {first_line(raised)}" if raised else type(error).__name__
    return _lost(error, phase, label, node_is_gone, reason)


def _lost(error: RayError, phase: Phase, label: str, node_is_gone: bool, reason: str) -> Failure:
    """Of a process, a node or an object."""
    if phase is Phase.COMMIT:
        return Failure(Cause.COMMIT_LOST, WorkerLost(f"{label}: {reason}"))
    if isinstance(error, ObjectLostError):
        return Failure(Cause.INPUT_LOST, PayloadLost(f"{label}: input payload lost with its node"))
    if node_is_gone:
        return Failure(Cause.NODE_LOST, NodeLost(f"{label}: its node was lost"))
    return Failure(Cause.WORKER_LOST, WorkerLost(f"{label}: {reason}"))
