"""Tensors are written with their digests and read back; differences to a record are named."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.tensor_io import (
    FINISHED_FOLDER,
    Payload,
    commit,
    copy_tensors,
    file_differences,
    finished_sha256,
    read_tensor,
    to_stored_tensor,
    to_tensor,
)
from pipeline.errors import OutputError, StoreError
from pipeline.storage.lease import acquire_lease
from pipeline.storage.store import FileRecord, Store

FILE = "model.safetensors"
TENSORS = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "empty": torch.empty(0, 4)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "out"))


@pytest.fixture
def record(store: Store) -> FileRecord:
    with acquire_lease(store) as lease:
        return commit(lease.ticket, FILE, Payload(tuple(to_stored_tensor(*item) for item in TENSORS.items())))


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_survives_as_bytes(name: str) -> None:
    assert torch.equal(to_tensor(to_stored_tensor(name, TENSORS[name])), TENSORS[name])


def test_what_was_committed_is_read_back(store: Store, record: FileRecord) -> None:
    infos = read_header(store, FILE)[1]
    assert all(torch.equal(read_tensor(store, info), TENSORS[info.name]) for info in infos)
    assert [info.name for info in infos] == ["b", "empty", "a"], "wide dtypes first"
    assert record.sha256 == store.sha256(FILE) == finished_sha256(store, FILE)
    with acquire_lease(store) as lease:
        assert copy_tensors(store, infos, lease.ticket, "copy.safetensors").tensors == record.tensors


def test_differences_name_the_tensor_that_changed(store: Store, record: FileRecord) -> None:
    recorded = FileRecord.from_json(FILE, dict(record.to_json()))
    assert recorded == record
    assert file_differences(store, FILE, dict(record.to_json())) == []
    path = Path(store.root, FILE)
    intact = path.read_bytes()
    for damaged, name in ((intact[:-1] + bytes([intact[-1] ^ 1]), "a"), (intact + b"x", "bytes"), (None, "missing")):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        (difference,) = file_differences(store, FILE, dict(record.to_json()))
        assert FILE in difference
        assert name in difference


def test_a_damaged_record_of_a_cache_is_named(store: Store, record: FileRecord) -> None:
    Path(store.root, FINISHED_FOLDER, f"{FILE}.json").write_text("{}")
    with pytest.raises(OutputError, match=FILE):
        finished_sha256(store, FILE)


def test_bytes_that_differ_from_a_known_digest_are_refused(store: Store, record: FileRecord) -> None:
    from dataclasses import replace

    info = next(info for info in read_header(store, FILE)[1] if info.name == "b")
    read_tensor(store, replace(info, sha256=(record.tensors["b"],)))
    with pytest.raises(StoreError, match="b"):
        read_tensor(store, replace(info, sha256=("0" * 64,)))
