"""Tasks, the jobs that they carry, and pools that run them.

The engine does not know what a job does. A feature defines its jobs as frozen dataclasses beside the flow that creates
the tasks. Classes named `Job*` exist on workers, classes named `Task*` on the driver.
"""

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import GPU_MEMORY_REMEDY, is_out_of_memory
from pipeline.errors import DISK_FULL_ERRNOS, DiskFull, RunError, SwscError, UserError, first_line
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
K = TypeVar("K", bound=Hashable)
M = TypeVar("M")


class ModelCache:
    """Keeps the last loaded model, because loading a model costs more than running it on a few windows."""

    def __init__(self) -> None:
        self._key: tuple[object, Hashable] | None = None
        self._model: Any = None

    def get(self, load: Callable[[K, str], M], key: K, device: str) -> M:
        """Return the model `load(key, device)`.

        A cached model of another loader or key is dropped before the new one is loaded.
        """
        if self._key != (load, key):
            self.clear()
            # Collecting the model later looks only at what is created from here on: 0.3 s less in a large process.
            gc.freeze()
            try:
                self._model, self._key = load(key, device), (load, key)
            except BaseException:
                gc.unfreeze()
                raise
        return cast(M, self._model)

    def clear(self) -> None:
        """Drop the model and free its memory."""
        if self._model is not None:
            self._key = self._model = None
            gc.collect()  # modules of transformers reference each other
            gc.unfreeze()


@dataclass(frozen=True)
class JobContext:
    """What a job gets from its worker.

    Attributes:
        device: torch's name of the worker's device.
        threads: CPU threads of the worker.
        models: cache of the model that consecutive jobs share.
        inputs: the payloads behind `Task.payloads`, in the same order.
    """

    device: str
    threads: int
    models: ModelCache = field(default_factory=ModelCache)
    inputs: tuple[Payload, ...] = ()

    def model(self, load: Callable[[K, str], M], key: K) -> M:
        """Return the model `load(key, device)`. The worker keeps it until a job asks for another one."""
        return self.models.get(load, key, self.device)


@dataclass(frozen=True)
class JobOutput(Generic[V_co]):
    """What a job returns: a small value for the driver, and payloads that stay on the worker's node."""

    value: V_co
    payloads: tuple[Payload, ...] = ()


class Job(Protocol[V_co]):
    """Picklable work for one worker."""

    def run(self, context: JobContext) -> JobOutput[V_co]:
        """Do the work. An exception of any class ends the task, and `TaskResult.error` carries it."""


@dataclass(frozen=True)
class Destination:
    """The file that a payload is committed to, and the ticket of the run that may write it."""

    ticket: Ticket
    file: str


@dataclass(frozen=True)
class Task(Generic[V]):
    """A job and what the driver has to know about it.

    Attributes:
        key: identifies the task within its run; hashable.
        job: the work.
        label: the task's name in messages.
        payloads: handles of the payloads that are passed to the job as `JobContext.inputs`.
        outputs: number of payloads that the job returns. They stay where they were computed, and the driver gets
            handles.
        commit_to: file to which the node that holds the first payload writes it.
        work: estimated work relative to the other tasks of the stage, for the remaining time; 0 if it is not known.
        nbytes: bytes that progress shows.
        units: what it counts as in the progress of its stage, whose `unit` names them.
    """

    key: Any
    job: Job[V]
    label: str = ""
    payloads: tuple[Any, ...] = ()
    outputs: int = 0
    commit_to: Destination | None = None
    work: float = 0.0
    nbytes: int = 0
    units: int = 1

    @property
    def kind(self) -> str:
        """Name of the job's class. Tasks of one kind take about equally long."""
        return type(self.job).__name__


@dataclass(frozen=True)
class TaskResult(Generic[V]):
    """How a task ended.

    Attributes:
        output: what the job returned for the driver; read it through `value`.
        payloads: handles of the job's payloads; empty if the first one was committed.
        record: size and digest of the committed file.
        error: why the task failed; None if it succeeded.
        worker: number of the worker that ran it.
    """

    task: Task[V]
    output: V | None = None
    payloads: tuple[Any, ...] = ()
    record: FileRecord | None = None
    error: SwscError | None = None
    worker: int = 0

    @property
    def value(self) -> V:
        """What the job returned. Raises the error of a failed task."""
        if self.error:
            raise self.error
        return cast(V, self.output)


class Pool(Protocol):
    """A number of workers, each of which runs at most one task at a time."""

    @property
    def size(self) -> int:
        """Number of workers, including those that have not started yet."""

    def idle(self) -> list[int]:
        """Return the numbers of the workers that can take a task now."""

    def start(self, worker: int, task: Task[Any]) -> None:
        """Start a task on an idle worker."""

    def wait(self) -> TaskResult[Any] | None:
        """Wait about a second for a task to end, and return its result; None if none has ended."""

    def waiting_for(self) -> str:
        """Describe the resources that workers which have not started yet need, and those that are free."""

    def close(self) -> None:
        """End the stage."""


def as_swsc_error(error: BaseException, label: str) -> SwscError:
    """Convert an exception of a job to an SwscError.

    An unexpected exception is converted to a RunError that names the task and the exception's class.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, SwscError):
        return type(error)(f"{label}: {error}")
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return DiskFull.from_os_error(error)
    if is_out_of_memory(error):
        return RunError(f"{label}: out of GPU memory ({first_line(error)}); {GPU_MEMORY_REMEDY}")
    reason = " ".join(str(error).split())
    return RunError(f"{label}: {type(error).__name__}: {reason}")
