"""What a failure under Ray means for the task, for its worker and for the run."""

import errno

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.engine.ray_backend.failures import Cause, Phase, classify
from pipeline.errors import (
    CheckpointError,
    DiskFull,
    NodeLost,
    PayloadLost,
    RunError,
    StoreError,
    SwscError,
    WorkerLost,
)

NO_MEMORY = OutOfMemoryError("Task was killed due to the node running low on memory.")
# Ray's words for a process that the operating system killed.
KILLED = RayActorError(
    "00" * 16,
    "Worker unexpectedly exits with a connection error code 2. End of file. (1) The process is killed by SIGKILL",
)
LOST = ObjectLostError("00" * 28, None, "")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
BROKEN_GPU = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def raised(cause: Exception) -> RayTaskError:
    """As Ray hands on what a job raised."""
    return RayTaskError("run_task", "Traceback", cause)


@pytest.mark.parametrize(
    ("error", "phase", "node_is_lost", "cause", "kind"),
    [
        (raised(CheckpointError("NaN")), Phase.JOB, False, Cause.ERROR, CheckpointError),
        (raised(StoreError("503")), Phase.JOB, False, Cause.ERROR, StoreError),
        (raised(ValueError("boom")), Phase.JOB, True, Cause.ERROR, RunError),
        (raised(OSError(errno.ENOSPC, "full", "/disk")), Phase.COMMIT, False, Cause.ERROR, DiskFull),
        (raised(OUT_OF_MEMORY), Phase.JOB, False, Cause.GPU_MEMORY, RunError),
        (raised(BROKEN_GPU), Phase.JOB, False, Cause.WORKER_LOST, WorkerLost),
        (raised(BROKEN_GPU), Phase.JOB, True, Cause.NODE_LOST, NodeLost),
        (raised(OutOfDiskError()), Phase.JOB, False, Cause.DISK_FULL, DiskFull),
        (OutOfDiskError(), Phase.COMMIT, False, Cause.DISK_FULL, DiskFull),
        (ActorDiedError(), Phase.JOB, False, Cause.WORKER_LOST, WorkerLost),
        (ActorDiedError(), Phase.JOB, True, Cause.NODE_LOST, NodeLost),
        (NO_MEMORY, Phase.JOB, False, Cause.HOST_MEMORY, RunError),
        (NO_MEMORY, Phase.JOB, True, Cause.NODE_LOST, NodeLost),
        (KILLED, Phase.JOB, False, Cause.KILLED, WorkerLost),
        (KILLED, Phase.JOB, True, Cause.NODE_LOST, NodeLost),
        (LOST, Phase.JOB, False, Cause.INPUT_LOST, PayloadLost),
        (LOST, Phase.JOB, True, Cause.INPUT_LOST, PayloadLost),
        (OwnerDiedError("00" * 28, None, ""), Phase.JOB, False, Cause.INPUT_LOST, PayloadLost),
        (LOST, Phase.COMMIT, False, Cause.COMMIT_LOST, WorkerLost),
        (WorkerCrashedError(), Phase.COMMIT, False, Cause.COMMIT_LOST, WorkerLost),
        (NodeDiedError("gone"), Phase.COMMIT, False, Cause.COMMIT_LOST, WorkerLost),
    ],
)  # fmt: skip
def test_a_failure_has_one_cause_and_one_error(
    error: RayError, phase: Phase, node_is_lost: bool, cause: Cause, kind: type[SwscError]
) -> None:
    failure = classify(error, phase, "layer 3", node_is_lost)
    assert failure.cause is cause
    assert type(failure.error) is kind


@pytest.mark.parametrize(
    ("error", "node_is_lost", "replaced", "blamed"),
    [
        (raised(ValueError("boom")), False, False, False),
        (raised(OUT_OF_MEMORY), False, True, False),
        (raised(BROKEN_GPU), False, True, True),
        (ActorDiedError(), False, True, True),
        (ActorDiedError(), True, True, False),
        (NO_MEMORY, False, True, False),
        (KILLED, False, True, True),
        (LOST, False, False, False),
        (OutOfDiskError(), False, False, False),
    ],
)
def test_a_worker_is_replaced_if_its_process_is_gone_and_blamed_unless_its_node_or_memory_is_at_fault(
    error: RayError, node_is_lost: bool, replaced: bool, blamed: bool
) -> None:
    failure = classify(error, Phase.JOB, "layer 3", node_is_lost)
    assert failure.replaces_worker is replaced
    assert failure.blames_worker is blamed


def test_the_death_of_a_commit_does_not_blame_the_worker() -> None:
    assert not classify(WorkerCrashedError(), Phase.COMMIT, "layer 3", False).replaces_worker


@pytest.mark.parametrize("error", [raised(ValueError("boom")), raised(BROKEN_GPU), ActorDiedError(), LOST])
def test_the_error_names_the_task(error: RayError) -> None:
    assert "layer 3" in str(classify(error, Phase.JOB, "layer 3", False).error)


def test_a_broken_gpu_is_named_by_the_first_line_of_its_error() -> None:
    message = str(classify(raised(BROKEN_GPU), Phase.JOB, "layer 3", False).error)
    assert "illegal memory access" in message
    assert "more" not in message


@pytest.mark.parametrize("error", [NO_MEMORY, KILLED])
def test_a_lack_of_memory_is_named_with_its_remedy(error: RayError) -> None:
    message = str(classify(error, Phase.JOB, "layer 3", False).error)
    assert "memory" in message
    assert "--memory-per-worker" in message
