"""The driver's loop on scripted pools."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipeline.engine import signals
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, TaskRound, execute
from pipeline.engine.task import JobContext, JobOutput, Task, TaskResult
from pipeline.errors import (
    CheckpointError,
    LeaseLost,
    NodeLost,
    RunError,
    StoreError,
    StoreOutage,
    SwscError,
    WorkerLost,
)


@dataclass(frozen=True)
class Work:
    """A job that no pool here runs."""

    def run(self, context: JobContext) -> JobOutput[str]:
        raise NotImplementedError


class ScriptedPool:
    """Two workers; a task ends with the next error of its script, or well when the script is used up."""

    size = 2

    def __init__(self, scripts: dict[str, list[SwscError]]) -> None:
        self.scripts = scripts
        self.busy: dict[int, Task[str]] = {}
        self.started: list[str] = []
        self.most_at_once = 0

    def idle(self) -> list[int]:
        return [worker for worker in range(self.size) if worker not in self.busy]

    def start(self, worker: int, task: Task[str]) -> None:
        self.busy[worker] = task
        self.started.append(task.key)
        self.most_at_once = max(self.most_at_once, len(self.busy))

    def wait(self) -> TaskResult[str] | None:
        worker, task = next(iter(self.busy.items()))
        del self.busy[worker]
        script = self.scripts.get(task.key, [])
        return TaskResult(task, task.key, error=script.pop(0) if script else None, worker=worker)

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None:
        pass


def run(names: str, scripts: dict[str, list[SwscError]]) -> tuple[ScriptedPool, list[str]]:
    pool, finished = ScriptedPool(scripts), []
    source = TaskList([Task(name, Work()) for name in names], lambda done: finished.append(done.value))
    with Progress("test", len(names), 0) as progress:
        execute(pool, source, progress)
    source.raise_failures()
    return pool, finished


def test_every_task_runs_once_in_the_order_given_on_all_workers() -> None:
    pool, finished = run("abcde", {})
    assert pool.started == list("abcde")
    assert sorted(finished) == list("abcde")
    assert pool.most_at_once == 2


def test_a_task_whose_worker_died_runs_again() -> None:
    pool, finished = run("abc", {"b": [WorkerLost("gone"), WorkerLost("gone")]})
    assert sorted(finished) == list("abc")
    assert pool.started.count("b") == 3
    assert pool.started.count("a") == 1


def test_a_task_whose_store_does_not_answer_runs_again() -> None:
    pool, finished = run("abc", {"b": [StoreError("s3://b/model: 503"), StoreError("s3://b/model: 503")]})
    assert sorted(finished) == list("abc")
    assert pool.started.count("b") == 3


def test_a_store_that_is_gone_ends_the_run_and_no_other_task_is_tried() -> None:
    pool = ScriptedPool({"a": [StoreOutage("s3://b: no good answer for 30 s")]})
    with pytest.raises(StoreOutage), Progress("test", 9, 0) as progress:
        execute(pool, TaskList([Task(name, Work()) for name in "abcdefghi"], lambda done: None), progress)
    assert pool.started.count("a") == 1
    assert len(pool.started) <= 3


def test_a_task_that_kills_every_worker_is_given_up_and_named_and_the_others_finish() -> None:
    pool, finished = ScriptedPool({"b": [WorkerLost("b dies")] * 9}), []
    source = TaskList([Task(name, Work()) for name in "abc"], lambda done: finished.append(done.value))
    with Progress("test", 3, 0) as progress:
        execute(pool, source, progress)
    assert sorted(finished) == ["a", "c"]
    assert pool.started.count("b") == 3
    with pytest.raises(RunError, match=r"1 tasks failed.*b dies"):
        source.raise_failures()


def test_what_kills_its_workers_comes_last_after_a_second_try() -> None:
    """So that a run which is ended for too many deaths has done what it could."""
    pool, finished = ScriptedPool({name: [WorkerLost("gone")] * 9 for name in "ab"}), []
    source = TaskList([Task(name, Work()) for name in "abcdef"], lambda done: finished.append(done.value))
    with Progress("test", 6, 0) as progress:
        execute(pool, source, progress)
    assert sorted(finished) == list("cdef")
    assert sorted(pool.started[:4]) == list("aabb")
    assert sorted(pool.started[-2:]) == list("ab")


def test_the_loss_of_nodes_is_hardly_charged_to_the_tasks_that_were_there() -> None:
    pool, finished = run("abc", {"b": [NodeLost("its node was lost")] * 8})
    assert sorted(finished) == list("abc")
    pool = ScriptedPool({"b": [NodeLost("its node was lost")] * 99})
    with Progress("test", 3, 0) as progress:
        execute(pool, TaskList([Task(name, Work()) for name in "abc"], lambda done: None), progress)
    assert pool.started.count("b") == 12


def test_a_run_whose_place_was_taken_stops_at_once() -> None:
    with pytest.raises(LeaseLost, match="taken over"):
        run("abcdef", {"a": [LeaseLost("another has taken over")]})


def test_a_failing_task_does_not_stop_the_others() -> None:
    pool = ScriptedPool({"a": [RunError("a: no luck")]})
    finished: list[str] = []
    source = TaskList([Task(name, Work()) for name in "abc"], lambda done: finished.append(done.value))
    with Progress("test", 3, 0) as progress:
        execute(pool, source, progress)
    assert sorted(finished) == ["b", "c"]
    with pytest.raises(RunError, match="1 tasks failed, the others are finished and kept: a: no luck"):
        source.raise_failures()


def test_a_users_mistake_stops_the_run_at_once() -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        run("abcdef", {"a": [CheckpointError("a holds NaN")]})


def test_a_round_returns_results_in_the_order_of_its_tasks() -> None:
    pool, tasks = ScriptedPool({"b": [WorkerLost("gone")]}), TaskRound([Task(name, Work()) for name in "abc"])
    with Progress("test", 3, 0) as progress:
        execute(pool, tasks, progress)
    assert [result.value for result in tasks.results] == ["a", "b", "c"]
    assert sorted(pool.started) == list("abbc")


def test_the_first_task_of_a_round_that_fails_ends_it() -> None:
    pool, tasks = ScriptedPool({"b": [RunError("b: no luck")]}), TaskRound([Task(name, Work()) for name in "abcdef"])
    with Progress("test", 6, 0) as progress, pytest.raises(RunError, match="b: no luck"):
        execute(pool, tasks, progress)
    assert "f" not in pool.started


class InterruptedWhenFreed:
    """Python drops what is raised in a finalizer."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install_handlers()
    yield
    signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_comes_while_an_object_is_freed_is_not_lost(listening: None) -> None:
    finished: list[str] = []

    def note(done: TaskResult[str]) -> None:
        finished.append(done.value)
        if len(finished) == 2:
            InterruptedWhenFreed()

    source = TaskList([Task(name, Work()) for name in "abcde"], note)
    with pytest.raises(KeyboardInterrupt), Progress("test", 5, 0) as progress:
        execute(ScriptedPool({}), source, progress)
    assert len(finished) == 2
