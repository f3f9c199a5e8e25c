"""Classification of a task's failure under Ray. It is a pure decision; the pool carries out what follows from it."""

from dataclasses import dataclass
from enum import Enum, auto

from ray.exceptions import ObjectLostError, OutOfDiskError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from pipeline.device import is_out_of_memory, requires_new_process
from pipeline.engine.task import as_swsc_error
from pipeline.errors import DiskFull, NodeLost, PayloadLost, RunError, SwscError, WorkerLost, first_line

# Ray's words for the end of an actor that its memory monitor chose, and of a process that received a signal, which is
# all that shows when the operating system chose it.
_OUT_OF_MEMORY, _KILLED = "NODE_OUT_OF_MEMORY", "SIGKILL"
MEMORY_REMEDY = "lower --memory-per-worker or the number of --workers, or use larger nodes"


class Phase(Enum):
    """The two phases of a task: its job on a worker, then the commit of a payload, which is a Ray task of its own."""

    JOB = auto()
    COMMIT = auto()


class Cause(Enum):
    """Why a task failed."""

    # The job or the commit raised an exception; the worker is intact.
    ERROR = auto()
    # The GPU had too little free memory; another process may have used it.
    GPU_MEMORY = auto()
    # The node had too little free memory, and Ray ended the worker's process.
    HOST_MEMORY = auto()
    # The worker's process was killed, perhaps by the operating system because memory ran out.
    KILLED = auto()
    # The disk to which Ray moves objects is full.
    DISK_FULL = auto()
    # An input payload was lost with its node.
    INPUT_LOST = auto()
    # The worker's node was lost.
    NODE_LOST = auto()
    # The worker's process died, or can no longer use its GPU.
    WORKER_LOST = auto()
    # The process of the commit died, or the payload that it had to write was lost.
    COMMIT_LOST = auto()


@dataclass(frozen=True)
class Failure:
    """The cause of a failure, and the error for the driver.

    WorkerLost and NodeLost mean that the task may be repeated.
    """

    cause: Cause
    error: SwscError

    @property
    def replaces_worker(self) -> bool:
        """Whether the worker's process is dead or has to be ended."""
        return self.cause in (Cause.GPU_MEMORY, Cause.HOST_MEMORY, Cause.KILLED, Cause.NODE_LOST, Cause.WORKER_LOST)

    @property
    def blames_worker(self) -> bool:
        """Whether the failure counts towards the number of worker deaths that ends a run."""
        return self.cause in (Cause.KILLED, Cause.WORKER_LOST)


def classify(error: RayError, phase: Phase, label: str, node_is_lost: bool) -> Failure:
    """Return the cause of `error`.

    Args:
        error: what Ray raised for the task.
        phase: the phase in which the task was.
        label: name of the task, for messages.
        node_is_lost: the worker's node is known to be dead.
    """
    raised = error.cause if isinstance(error, RayTaskError) and not isinstance(error, ObjectLostError) else None
    if isinstance(error, OutOfDiskError) or isinstance(raised, OutOfDiskError):
        message = f"{label}: the disk to which Ray moves objects is full on a node; free some space there"
        return Failure(Cause.DISK_FULL, DiskFull(message))
    if isinstance(raised, BaseException) and is_out_of_memory(raised):
        return Failure(Cause.GPU_MEMORY, as_swsc_error(raised, label))
    if isinstance(raised, BaseException) and not requires_new_process(raised):
        return Failure(Cause.ERROR, as_swsc_error(raised, label))
    reason = f"{type(raised).__name__}: {first_line(raised)}" if raised else type(error).__name__
    return _loss(error, phase, f"{label}: {reason}", label, node_is_lost)


def _loss(error: RayError, phase: Phase, message: str, label: str, node_is_lost: bool) -> Failure:
    """The loss of a process, a node or an object."""
    if phase is Phase.COMMIT:
        return Failure(Cause.COMMIT_LOST, WorkerLost(message))
    if isinstance(error, ObjectLostError):
        return Failure(Cause.INPUT_LOST, PayloadLost(f"{label}: input payload lost with its node"))
    if node_is_lost:
        return Failure(Cause.NODE_LOST, NodeLost(f"{label}: its node was lost"))
    if isinstance(error, OutOfMemoryError) or _OUT_OF_MEMORY in str(error):
        return Failure(Cause.HOST_MEMORY, RunError(f"{label}: its node ran out of memory; {MEMORY_REMEDY}"))
    if isinstance(error, RayActorError) and _KILLED in str(error):
        killed = f"{label}: its process was killed, which systems do when memory runs out; {MEMORY_REMEDY}"
        return Failure(Cause.KILLED, WorkerLost(killed))
    return Failure(Cause.WORKER_LOST, WorkerLost(message))
