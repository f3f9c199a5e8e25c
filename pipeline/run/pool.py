"""Workers behind one interface: here a plain loop in this process, in cluster.py actors of Ray.

A pool knows tasks and workers, not what they are about. It starts a task on an idle worker and says what came of it;
which task goes where, and what happens after a failure, is the driver's decision (driver.py).
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.device import ROOM, is_out_of_memory, spoils_the_process
from pipeline.errors import FULL, DiskFull, RunError, SwscError, UserError, first_line
from pipeline.model.lease import Ticket
from pipeline.model.parts import commit
from pipeline.run.worker import Worker


@dataclass(frozen=True)
class Task:
    """One call of a worker's method.

    Attributes:
        key: names the task among those of its run; hashable.
        label: what a person calls it.
        payloads: handles of large arguments, passed on after `args`.
        outputs: number of payloads that the method returns after its first value. They stay where they were made, and
            the driver gets handles of them.
        commit_to: (ticket, file): write the first payload there, beside where it lies.
        weight: bytes of work, for progress.
    """

    key: Any
    method: str
    args: tuple[Any, ...]
    label: str = ""
    payloads: tuple[Any, ...] = ()
    outputs: int = 0
    commit_to: tuple[Ticket, str] | None = None
    weight: int = 0


@dataclass(frozen=True)
class Done:
    """What came of a task: a value, handles of its payloads, what was written; or an error."""

    task: Task
    value: Any = None
    payloads: tuple[Any, ...] = ()
    record: Any = None
    error: SwscError | None = None
    worker: int = 0


class Pool(Protocol):
    """A number of workers, each with at most one task at a time."""

    size: int

    def idle(self) -> list[int]:
        """Workers that are up and may be given a task now."""

    def start(self, worker: int, task: Task) -> None:
        """Begin a task on an idle worker."""

    def wait(self) -> Done | None:
        """Wait a moment for a task to end; None if none did."""

    def waiting_for(self) -> str:
        """What workers that are not up yet need, and what there is of it."""

    def close(self) -> None:
        """Let the workers go."""


@dataclass
class LocalPool:
    """One worker in this process: `--local`. Gives the same bytes as a cluster."""

    worker: Worker
    size: int = 1
    _waiting: list[Task] = field(default_factory=list)

    def idle(self) -> list[int]:
        return [] if self._waiting else [0]

    def start(self, worker: int, task: Task) -> None:
        self._waiting.append(task)

    def wait(self) -> Done | None:
        task = self._waiting.pop()
        try:
            result = getattr(self.worker, task.method)(*task.args, *task.payloads)
            value, payloads = (result[0], tuple(result[1:])) if task.outputs else (result, ())
            record = commit(*task.commit_to, payloads[0]) if task.commit_to else None
        except Exception as error:
            found = as_swsc_error(error, task)
            if spoils_the_process(error) and not is_out_of_memory(error):
                raise RunError(f"{found}: this process can do no more on its GPU; run the same command again") from None
            return Done(task, error=found)
        return Done(task, value, payloads, record)

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None:
        self._waiting.clear()


def as_swsc_error(error: BaseException, task: Task) -> SwscError:
    """The error as one of ours; anything unforeseen names the task and the kind of error."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SwscError):
        return type(error)(f"{task.label}: {error}")
    if isinstance(error, OSError) and error.errno in FULL:
        return DiskFull.of(error)
    if is_out_of_memory(error):
        return RunError(f"{task.label}: the memory of the GPU does not do ({first_line(error)}); {ROOM}")
    reason = " ".join(str(error).split())
    return RunError(f"{task.label}: {type(error).__name__}: {reason}")
