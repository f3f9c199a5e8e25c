"""Errors that the pipeline raises on purpose.

Each carries one finished sentence for the user, and nothing else, so that it survives pickling between processes.
`exit_code` is what the process ends with: 2 for a user's mistake (nothing was written), 1 for a run that failed.
"""

import errno

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # of a disk that takes nothing more


class SwscError(Exception):
    """Root of the tree; the run failed and what is finished is kept."""

    exit_code = 1


class UserError(SwscError):
    """A mistake in what the user gave; nothing is written."""

    exit_code = 2


class ConfigError(UserError):
    """Flags or configuration files that cannot be carried out; names every mistake at once."""


class CheckpointError(UserError):
    """A source checkpoint that is missing, damaged, hostile or of a kind that is not read."""


class UncompressibleWeight(CheckpointError):
    """A selected weight that cannot be compressed, because it holds NaN, Inf or values that overflow."""


class OutputError(UserError):
    """An output directory that must not or cannot be written."""


class UnusableOutput(OutputError):
    """An output directory that holds another output, or a damaged one. `remedy` is for a user's; a part of a cache has another."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.found, self.remedy)))


class TextError(UserError):
    """A text that cannot be evaluated on."""


class LmEvalTaskError(UserError):
    """A task of lm-eval that is not there, or cannot be carried out."""


class ClusterError(UserError):
    """A cluster that is not there or can never hold the workers that were asked for."""


class RunError(SwscError):
    """A task failed; the message names it."""


class DamageError(RunError):
    """An output that is not as it was written; the message says what differs."""


class StoreError(RunError):
    """A disk or an object store that does not answer, or refuses."""


class StoreUnavailable(StoreError):
    """An object store that does not answer, or refuses who asks: asking again at once does not help."""


class StoreOutage(StoreUnavailable):
    """An object store that has given no good answer for a while: no other task would fare better, and the run ends at once."""


class DiskFull(RunError):
    """A disk that is full, over quota or read-only: no other task would fare better, and the run ends at once."""

    @classmethod
    def of(cls, error: OSError) -> "DiskFull":
        """From an error of the system whose `errno` is in FULL."""
        remedy = "mount it writable" if error.errno == errno.EROFS else "make room"
        where = f"{error.filename}: " if error.filename else ""
        return cls(f"{where}{error.strerror}; {remedy}, run the same command again: what is finished is kept")


class NonFiniteLoss(RunError):
    """A window whose loss is NaN or Inf; it is never dropped."""


class WorkerLost(RunError):
    """The process or the object of a task went away; the task itself is not to blame and may run again."""


class NodeLost(WorkerLost):
    """The whole node of a task went away, which says even less about the task."""


class PayloadLost(RunError):
    """What a task was to be given went away with its node; whoever deals out tasks has to have it made again."""


def first_line(error: BaseException) -> str:
    """What a library's error says first; with the line after it where that only says of what ("Validation error for field 'x':")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
