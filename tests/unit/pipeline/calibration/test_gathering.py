"""Order of the tasks of a calibration; payload handles are strings, and no worker runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.calibration.gathering import Gathering, LayerRange, WindowShards
from pipeline.calibration.hessian_store import HessianPart, HessianRow, StoredHessian
from pipeline.calibration.job import AddHessians, GatherHessians, KeepHessians
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import PayloadLost, RunError, StoreError
from pipeline.models.loading import ModelKey
from pipeline.outputs.transaction import Output
from pipeline.storage.store import Store

PART = HessianPart("layer", ("a", "b"))
RANGE = LayerRange((PART,))
ROWS = (HessianRow("a", 10, "a", "0" * 64), HessianRow("b", 10, "a", "1" * 64))
SHARDS = WindowShards(np.arange(50).reshape(5, 10), size=2, seed=0)


@pytest.fixture
def gathering(tmp_path: Path) -> Gathering:
    output = SimpleNamespace(store=Store.at(str(tmp_path)), ticket=None)
    return Gathering(ModelKey("model", "float32", 1), SHARDS, cast(Output, output))


def queued(gathering: Gathering) -> list[Task[Any]]:
    return list(iter(lambda: gathering.next(0), None))


def gathered(task: Task[Any], digests: dict[str, str] | None = None) -> TaskResult[Any]:
    return TaskResult(task, output=digests or {}, payloads=(f"shard {task.key.start}",))


def test_shards_are_added_in_the_order_of_the_text(gathering: Gathering) -> None:
    """They arrive in another order: 4, 0, 2."""
    assert gathering.start_pass([RANGE]) == len(SHARDS.ids)
    tasks = {task.key.start: task for task in queued(gathering)}
    assert list(tasks) == [0, 2, 4]
    for start in (4, 0):
        gathering.done(gathered(tasks[start]))
        assert queued(gathering) == []
    gathering.done(gathered(tasks[2]))
    (add,) = queued(gathering)
    assert (add.job, add.payloads) == (AddHessians(), ("shard 0", "shard 2"))
    gathering.done(TaskResult(add, payloads=("sum",)))
    (add,) = queued(gathering)
    assert add.payloads == ("sum", "shard 4")
    gathering.done(TaskResult(add, payloads=("total",)))
    (write,) = queued(gathering)
    assert (write.job, write.payloads) == (KeepHessians(), ("total",))
    assert write.commit_to is not None
    assert write.commit_to.file == PART.file
    gathering.done(TaskResult(write, output=ROWS))
    assert [task.units for task in (*tasks.values(), add, write)] == [2, 2, 1, 0, 0]
    assert gathering.written == [StoredHessian(PART.file, row) for row in ROWS]
    gathering.raise_failures()


def test_the_parts_of_a_layer_have_sums_and_files_of_their_own(gathering: Gathering) -> None:
    other = HessianPart("layer", ("c",))
    assert gathering.start_pass([LayerRange((PART, other))]) == len(SHARDS.ids)
    tasks = queued(gathering)
    assert {task.outputs for task in tasks} == {2}
    job = tasks[0].job
    assert isinstance(job, GatherHessians)
    assert job.parts == (("a", "b"), ("c",))
    for task in tasks:
        gathering.done(TaskResult(task, output={}, payloads=(f"first {task.key.start}", f"other {task.key.start}")))
    adds = queued(gathering)
    assert [add.payloads for add in adds] == [("other 0", "other 2"), ("first 0", "first 2")]
    gathering.done(TaskResult(adds[0], payloads=("sum",)))
    (last,) = queued(gathering)
    gathering.done(TaskResult(last, payloads=("total",)))
    (write,) = queued(gathering)
    assert write.commit_to is not None
    assert write.commit_to.file == other.file != PART.file


def test_a_lost_payload_is_a_failure_unless_another_pass_starts(gathering: Gathering) -> None:
    gathering.start_pass([RANGE])
    gathering.done(TaskResult(queued(gathering)[0], error=PayloadLost("gone")))
    assert len(gathering.lost) == 1
    with pytest.raises(RunError, match="gone"):
        gathering.raise_failures()
    gathering.start_pass([RANGE])
    assert gathering.lost == []


def test_workers_that_read_different_bytes_are_refused(gathering: Gathering) -> None:
    gathering.start_pass([RANGE])
    first, second, _ = queued(gathering)
    gathering.done(gathered(first, {"model.safetensors:0-8": "a" * 64}))
    with pytest.raises(StoreError, match=r"model\.safetensors:0-8"):
        gathering.done(gathered(second, {"model.safetensors:0-8": "b" * 64}))


def test_the_last_shard_may_be_shorter() -> None:
    assert [len(SHARDS.shard(start)) for start in SHARDS.starts] == [2, 2, 1]
