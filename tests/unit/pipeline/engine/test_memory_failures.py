"""A lack of memory ends a run after few attempts, with an error that names memory and the remedy."""

import pytest

from pipeline.device import GPU_MEMORY_REMEDY
from pipeline.engine.ray_backend.failures import MEMORY_REMEDY, Cause, Failure
from pipeline.engine.ray_backend.memory_failures import MemoryFailures
from pipeline.errors import RunError, WorkerLost

GPU = Failure(Cause.GPU_MEMORY, RunError(f"a task: out of memory; {GPU_MEMORY_REMEDY}"))
HOST = Failure(Cause.HOST_MEMORY, RunError(f"a task: its node ran out of memory; {MEMORY_REMEDY}"))
KILLED = Failure(Cause.KILLED, WorkerLost(f"a task: its process was killed; {MEMORY_REMEDY}"))
DEAD = Failure(Cause.WORKER_LOST, WorkerLost("a task: ActorDiedError"))


@pytest.mark.parametrize("failure", [GPU, HOST])
def test_a_task_without_memory_runs_twice(failure: Failure) -> None:
    failures = MemoryFailures()
    first = failures.decide("a", failure)
    assert isinstance(first.error, WorkerLost)
    assert "lower" not in str(first.error), "the remedy belongs to the last error"
    assert failures.decide("a", failure) == failure
    assert isinstance(failures.decide("b", failure).error, WorkerLost), "another task has its own attempts"


@pytest.mark.parametrize("failure", [GPU, HOST, KILLED])
def test_six_failures_in_a_row_end_the_run(failure: Failure) -> None:
    failures = MemoryFailures()
    for task in range(5):
        failures.decide(task, failure)
    with pytest.raises(RunError, match=r"too small 6 times in a row.*lower --(memory-per-worker|batch-size)"):
        failures.decide(5, failure)


def test_a_task_that_succeeded_ends_the_row() -> None:
    failures = MemoryFailures()
    for task in range(20):
        failures.decide(task, HOST)
        failures.succeeded()


def test_killed_processes_count_only_until_a_task_of_the_stage_succeeded() -> None:
    failures = MemoryFailures()
    failures.succeeded()
    for task in range(20):
        assert failures.decide(task, KILLED) == KILLED


def test_other_failures_are_not_counted() -> None:
    failures = MemoryFailures()
    assert [failures.decide(task, DEAD) for task in range(20)] == [DEAD] * 20
