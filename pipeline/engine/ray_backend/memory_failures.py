"""When a lack of memory ends a run: a pure decision, like `failures.py`.

A task that ran out of memory runs once more, in a new process, because another process may have used the memory. After
some such failures in a row the run ends: it would load the same weights again and again.
"""

from collections import Counter
from typing import Any

from pipeline.device import GPU_MEMORY_REMEDY
from pipeline.engine.ray_backend.failures import MEMORY_REMEDY, Cause, Failure
from pipeline.errors import RunError, WorkerLost

# Attempts at a task that runs out of memory.
_ATTEMPTS = 2
# Failures in a row, without a task that succeeded, that end the run.
_MAX_IN_A_ROW = 3 * _ATTEMPTS


class MemoryFailures:
    """The failures of a stage for lack of memory."""

    def __init__(self) -> None:
        # Key of a task -> its failures.
        self._of_task: Counter[Any] = Counter()
        self._in_a_row = 0
        self._any_success = False

    def succeeded(self) -> None:
        """Note that a task succeeded."""
        self._in_a_row, self._any_success = 0, True

    def decide(self, key: Any, failure: Failure) -> Failure:
        """Return the failure with the error that the driver gets; WorkerLost lets the task run again.

        Args:
            key: key of the task.
            failure: any failure; those that memory cannot have caused are returned as they are.

        Raises:
            RunError: too many tasks in a row ran out of memory.
        """
        if failure.cause not in (Cause.GPU_MEMORY, Cause.HOST_MEMORY, Cause.KILLED):
            return failure
        if failure.cause is Cause.KILLED and self._any_success:
            return failure  # not the system, as it kills for memory; or a task that is larger than the others
        self._in_a_row += 1
        if self._in_a_row >= _MAX_IN_A_ROW:
            kind = "GPU memory" if failure.cause is Cause.GPU_MEMORY else "memory"
            raise RunError(f"{kind} was too small {self._in_a_row} times in a row, the last time for {failure.error}")
        if failure.cause is Cause.KILLED:
            return failure
        self._of_task[key] += 1
        if self._of_task[key] < _ATTEMPTS:
            message = str(failure.error)
            for remedy in (GPU_MEMORY_REMEDY, MEMORY_REMEDY):
                message = message.removesuffix(f"; {remedy}")
            return Failure(failure.cause, WorkerLost(message))
        return failure
