"""Order of the tasks of a calibration; payload handles are strings, and no worker runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.calibration.gathering import Gathering, LayerRange, WindowShards
from pipeline.calibration.job import AddHessians, ExtractHessian
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import PayloadLost, RunError, StoreError
from pipeline.models.loading import ModelKey
from pipeline.outputs.transaction import Output
from pipeline.storage.store import Store

RANGE = LayerRange({"layer": ["a", "b"]})
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
    writes = queued(gathering)
    assert [(write.job, write.payloads) for write in writes] == [
        (ExtractHessian("b"), ("total",)),
        (ExtractHessian("a"), ("total",)),
    ]
    for write in writes:
        gathering.done(TaskResult(write))
    assert [task.units for task in (*tasks.values(), add, *writes)] == [2, 2, 1, 0, 0, 0]
    assert gathering.written == {"a", "b"}
    gathering.raise_failures()


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
