"""Tasks, the jobs that they carry, and pools that run them.

The engine knows nothing of what a job does. A feature defines its jobs as frozen dataclasses beside the flow that hands them out;
`Job*` is what exists on a worker, `Task*` what the driver holds.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import ROOM, is_out_of_memory
from pipeline.errors import DISK_FULL_ERRNOS, DiskFull, RunError, SwscError, UserError, first_line
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
K = TypeVar("K", bound=Hashable)
M = TypeVar("M")


class ModelSlot:
    """At most one loaded model, because loading one costs more than using it for a few windows."""

    def __init__(self) -> None:
        self._key: tuple[object, Hashable] | None = None
        self._model: Any = None

    def get(self, load: Callable[[K, str], M], key: K, device: str) -> M:
        """The model `load(key, device)`, loaded again only if the slot holds another one, which is dropped first."""
        if self._key != (load, key):
            self.clear()
            self._model, self._key = load(key, device), (load, key)
        return cast(M, self._model)

    def clear(self) -> bool:
        """Drop the model; returns whether there was one."""
        held = self._model is not None
        self._key = self._model = None
        return held


@dataclass(frozen=True)
class JobContext:
    """What a worker gives to a job.

    Attributes:
        device: torch's name of the worker's device.
        threads: CPU threads of the worker.
        models: slot for the model that jobs of one kind share.
        inputs: payloads of `Task.payloads`, in their order.
    """

    device: str
    threads: int
    models: ModelSlot = field(default_factory=ModelSlot)
    inputs: tuple[Payload, ...] = ()

    def model(self, load: Callable[[K, str], M], key: K) -> M:
        """The loaded model `load(key, device)`; the worker keeps it until a job asks for another one."""
        return self.models.get(load, key, self.device)


@dataclass(frozen=True)
class JobOutput(Generic[V_co]):
    """What a job returns: a small value for the driver, and payloads that stay on the worker's node."""

    value: V_co
    payloads: tuple[Payload, ...] = ()


class Job(Protocol[V_co]):
    """Picklable work for one worker."""

    def run(self, context: JobContext) -> JobOutput[V_co]:
        """Do the work; whatever it raises becomes the error of the task's result."""


@dataclass(frozen=True)
class Destination:
    """A file that a payload is committed to, and the ticket of the run that may write it."""

    ticket: Ticket
    file: str


@dataclass(frozen=True)
class Task(Generic[V]):
    """A job and what the driver has to know about it.

    Attributes:
        key: identifies the task within its run; hashable.
        job: the work.
        label: the task's name in messages.
        payloads: handles of the payloads that become `JobContext.inputs`.
        outputs: number of payloads that the job returns. They stay where they were computed; the driver gets handles.
        commit_to: where the first payload is written, on the node that holds it.
        weight: bytes of work, for progress.
    """

    key: Any
    job: Job[V]
    label: str = ""
    payloads: tuple[Any, ...] = ()
    outputs: int = 0
    commit_to: Destination | None = None
    weight: int = 0

    @property
    def kind(self) -> str:
        """Name of the job's class: tasks of one kind take about equally long."""
        return type(self.job).__name__


@dataclass(frozen=True)
class TaskResult(Generic[V]):
    """How a task ended.

    Attributes:
        output: what the job returned for the driver; read it by `value`.
        payloads: handles of the job's payloads, unless the first one was committed.
        record: of the committed file.
        error: why the task failed, if it did.
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
        """What the job returned; raises the error of a task that failed."""
        if self.error:
            raise self.error
        return cast(V, self.output)


class Pool(Protocol):
    """A number of workers, each with at most one task at a time."""

    @property
    def size(self) -> int:
        """Number of workers, those that are not up yet included."""

    def idle(self) -> list[int]:
        """Workers that are up and may be given a task now."""

    def start(self, worker: int, task: Task[Any]) -> None:
        """Begin a task on an idle worker."""

    def wait(self) -> TaskResult[Any] | None:
        """Wait a moment for a task to end; None if none did."""

    def waiting_for(self) -> str:
        """What workers that are not up yet need, and what there is of it."""

    def close(self) -> None:
        """End the stage."""


def as_swsc_error(error: BaseException, label: str) -> SwscError:
    """The error of a job as one of `SwscError`; an unexpected one becomes a RunError with the task's label and its own class."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SwscError):
        return type(error)(f"{label}: {error}")
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return DiskFull.from_os_error(error)
    if is_out_of_memory(error):
        return RunError(f"{label}: out of GPU memory ({first_line(error)}); {ROOM}")
    reason = " ".join(str(error).split())
    return RunError(f"{label}: {type(error).__name__}: {reason}")
