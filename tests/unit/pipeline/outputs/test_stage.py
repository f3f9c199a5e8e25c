"""Claims about the check of finished files: who hashes them, and what is made of the findings."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine.local_pool import LocalPool
from pipeline.engine.memory import Room
from pipeline.engine.stage import Stage
from pipeline.engine.task import JobContext, JobOutput, Pool
from pipeline.engine.worker import Worker
from pipeline.outputs import stage as module
from pipeline.outputs.existing_output import check_in_threads
from pipeline.outputs.stage import CheckFile, check_on
from pipeline.storage.store import FileRecord, Store

Files = tuple[Store, dict[str, FileRecord]]


class RecordedPools:
    """Pools of one worker, which pass for workers on other machines and record their stages."""

    in_process = False

    def __init__(self) -> None:
        self.stages: list[tuple[int, Stage]] = []

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        self.stages.append((tasks, stage))
        return LocalPool(Worker(1, "cpu"))

    def require_workers(self, stage: Stage) -> None: ...

    def room(self) -> Room:
        return Room("cpu", 1 << 40)

    def release(self) -> None: ...


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Two files, of which the second has other bytes than its record, and one that is missing."""
    store = Store.at(str(tmp_path))
    records = {name: store.write(name, [name.encode() * size]) for name, size in {"a": 5, "b": 9, "c": 1}.items()}
    records["b"] = replace(records["b"], sha256="0" * 64)
    store.remove("c")
    return store, records


DIFFERENCES: Mapping[str, list[str]] = {"a": [], "b": ["b: content differs"], "c": ["c is missing"]}


def test_few_bytes_are_hashed_by_the_driver(files: Files) -> None:
    pools = RecordedPools()
    assert check_on(pools)(*files) == DIFFERENCES == check_in_threads(*files)
    assert pools.stages == []


def test_many_bytes_are_hashed_by_workers_without_a_gpu(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_BY_DRIVER", 10)
    pools = RecordedPools()
    assert check_on(pools)(*files) == DIFFERENCES
    ((tasks, stage),) = pools.stages
    assert (tasks, stage.name, stage.on_cpu) == (3, "check finished files", True)


def test_the_only_worker_in_this_process_hashes_nothing(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_BY_DRIVER", 10)
    pools = RecordedPools()
    pools.in_process = True
    assert check_on(pools)(*files) == DIFFERENCES
    assert pools.stages == []


def test_what_a_node_does_not_see_is_not_taken_for_damaged(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_BY_DRIVER", 10)
    monkeypatch.setattr(CheckFile, "run", _sees_nothing)
    assert check_on(RecordedPools())(*files) == DIFFERENCES


def _sees_nothing(self: CheckFile, context: JobContext) -> JobOutput[list[str]]:
    return JobOutput([f"{self.file} is missing"])
