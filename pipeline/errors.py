"""The exceptions that the pipeline raises on purpose.

::

    SwscError                       exit code 1: the run failed, finished work is kept
    ├── UserError                   exit code 2: the input is wrong
    │   ├── ConfigError             flags or a configuration file
    │   ├── CheckpointError         a source checkpoint
    │   │   ├── BlocksUnsupported
    │   │   └── UncompressibleWeight
    │   ├── OutputError             an output directory
    │   │   └── UnusableOutput
    │   ├── TextError               a text to calibrate or evaluate on
    │   ├── LmEvalTaskError         a task of lm-eval
    │   └── ClusterError            a Ray cluster
    └── RunError
        ├── DamageError             a file differs from what was written
        ├── StoreError              a disk or an object store fails
        │   └── StoreUnavailable
        │       ├── StoreNotResponding
        │       ├── CredentialsRefused
        │       └── StoreOutage
        ├── DiskFull
        ├── LeaseLost               another run took over the output directory
        ├── NonFiniteLoss
        ├── WorkerLost
        │   └── NodeLost
        └── PayloadLost

Each exception carries one complete sentence for the user and pickles, so that it can cross process boundaries.
`exit_code` is the exit code of the process.
"""

import errno

# Error numbers of a disk on which nothing more can be written.
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class SwscError(Exception):
    """Base class. The run failed; finished work is kept."""

    exit_code = 1


class UserError(SwscError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """Flags or configuration files are invalid; the message lists every mistake."""


class CheckpointError(UserError):
    """A source checkpoint is missing, damaged, hostile or in an unsupported format."""


class BlocksUnsupported(CheckpointError):
    """A model cannot run in blocks of layers; the message gives the reason."""


class UncompressibleWeight(CheckpointError):
    """A selected weight holds NaN, Inf or values that overflow."""


class OutputError(UserError):
    """An output directory cannot or must not be written."""


class UnusableOutput(OutputError):
    """An output directory holds a different output, or a damaged one.

    Attributes:
        problem: what is wrong with the directory.
        remedy: what the user can do about an output. A caller that uses the directory as a cache gives another remedy.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.problem, self.remedy)))


class TextError(UserError):
    """A text cannot be used for calibration or evaluation."""


class LmEvalTaskError(UserError):
    """A task of lm-eval does not exist or cannot run."""


class ClusterError(UserError):
    """A cluster cannot be reached, or can never hold the requested workers."""


class RunError(SwscError):
    """A task failed; the message names it."""


class DamageError(RunError):
    """An output differs from what was written; the message names what differs."""


class StoreError(RunError):
    """A disk or an object store does not answer, or refuses a request."""


class StoreUnavailable(StoreError):
    """An object store serves no request currently, so that an immediate retry cannot help."""


class StoreNotResponding(StoreUnavailable):
    """An object store does not answer, or answers that it is overloaded."""


class CredentialsRefused(StoreUnavailable):
    """An object store answers and refuses the credentials."""


class StoreOutage(StoreUnavailable):
    """An object store has been unavailable for too long. Other tasks would fail too, so the run ends at once."""


class DiskFull(RunError):
    """A disk is full, over quota or read-only. Other tasks would fail too, so the run ends at once."""

    @classmethod
    def from_os_error(cls, error: OSError) -> "DiskFull":
        """Convert an OSError whose `errno` is in DISK_FULL_ERRNOS."""
        remedy = "mount it writable" if error.errno == errno.EROFS else "free some space"
        path = f"{error.filename}: " if error.filename else ""
        return cls(f"{path}{error.strerror}; {remedy} and run the same command again: finished work is kept")


class LeaseLost(RunError):
    """Another run has taken over the output directory."""


class NonFiniteLoss(RunError):
    """A loss is NaN or Inf. Such a window is never dropped."""


class WorkerLost(RunError):
    """The worker process of a task was lost, or the object that holds its result. The task may run again."""


class NodeLost(WorkerLost):
    """The node of a task was lost. The task may run again."""


class PayloadLost(RunError):
    """The input payload of a task was lost with its node and has to be recomputed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message; with the second line if the first one ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
