"""A pool of one worker in this process (`--local`). It produces the same bytes as a cluster."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.checkpoints.tensor_io import commit
from pipeline.device import is_out_of_memory, requires_new_process
from pipeline.engine.task import Task, TaskResult, as_swsc_error
from pipeline.engine.worker import Worker
from pipeline.errors import RunError


@dataclass
class LocalPool:
    """Runs each task in `wait`."""

    worker: Worker
    size: int = 1
    _waiting: list[Task[Any]] = field(default_factory=list)

    def idle(self) -> list[int]:
        return [] if self._waiting else [0]

    def start(self, worker: int, task: Task[Any]) -> None:
        self._waiting.append(task)

    def wait(self) -> TaskResult[Any] | None:
        task = self._waiting.pop()
        try:
            output = self.worker.run(task.job, *task.payloads)
            target = task.commit_to
            record = commit(target.ticket, target.file, output.payloads[0]) if target else None
        except Exception as error:
            failure = as_swsc_error(error, task.label)
            if requires_new_process(error) and not is_out_of_memory(error):
                raise RunError(
                    f"{failure}: this process can no longer use the GPU; run the same command again"
                ) from None
            return TaskResult(task, error=failure)
        return TaskResult(task, output.value, output.payloads, record)

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None:
        self._waiting.clear()
