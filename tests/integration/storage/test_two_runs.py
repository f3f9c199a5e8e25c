"""Two runs on one output: one at a time, and never a mixture of both."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoints.checkpoint import RUN
from pipeline.checkpoints.tensor_io import Payload, StoredTensor, commit
from pipeline.errors import LeaseLost
from pipeline.outputs import transaction as outputs
from pipeline.storage import lease
from pipeline.storage.files import BytesLike
from pipeline.storage.store import Store
from tests.support.commands import compress
from tests.support.tiny import contents


def test_the_second_is_refused_and_the_first_is_not_disturbed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.at(str(tmp_path / "out"))
    first = lease.acquire_lease(store, renewal_seconds=0.2)
    assert compress(tiny_model, tmp_path / "out") == 2
    assert "is writing there; wait for it, or stop it" in capsys.readouterr().err
    first.ticket.require()
    first.release()
    assert compress(tiny_model, tmp_path / "out") == 0


def test_a_run_whose_place_was_taken_writes_no_more(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = outputs.acquire_lease, []

    def acquire(store: Store, *rest: Any) -> lease.Lease:
        own = real(store, *rest)
        calls.append(own)
        store.write_json(lease.LEASE_FILE, {"owner": "another", "machine": "far", "pid": 1, "beat": 1})
        return own

    monkeypatch.setattr(outputs, "acquire_lease", acquire)
    assert compress(tiny_model, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "a run on far (process 1) has taken over" in error
    assert error.count("has taken over") == 1, "the first refusal ends it: the other layers are not compressed"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / RUN).exists()


def test_files_of_a_run_that_lost_its_place_are_not_taken_for_work_of_its_successor(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with 5 bits hangs just before a commit, one with 3 bits takes its place, then the first one resumes."""
    assert compress(tiny_model, tmp_path / "straight", "--bits", "3") == 0
    place, real = tmp_path / "out", Store.write

    def cut_short(self: Store, name: str, pieces: Iterable[BytesLike]) -> object:
        if name == "config.json":
            raise KeyboardInterrupt
        return real(self, name, pieces)

    monkeypatch.setattr(Store, "write", cut_short)
    assert compress(tiny_model, place, "--bits", "5") == 130
    names = ["model-00001-of-00007.safetensors", ".swsc/done/model-00001-of-00007.safetensors.json"]
    late = {name: (place / name).read_bytes() for name in names}
    assert compress(tiny_model, place, "--bits", "3", "--overwrite") == 130
    monkeypatch.undo()
    for name, data in late.items():
        (place / name).write_bytes(data)
    assert compress(tiny_model, place, "--bits", "3") == 0
    assert contents(place) == contents(tmp_path / "straight")


@pytest.mark.parametrize("point", ["in the middle of its file", "after its file"])
def test_a_commit_looks_again_whether_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    store = Store.at(str(tmp_path / "out"))
    own = lease.acquire_lease(store)
    real = Store.write

    def lost() -> None:
        store.put(lease.LEASE_FILE, json.dumps({"owner": "another", "machine": "far", "pid": 1, "beat": 1}).encode())

    def meanwhile(pieces: Iterator[BytesLike]) -> Iterator[BytesLike]:
        yield next(pieces)
        lost()
        yield from pieces

    def write(self: Store, name: str, pieces: Iterable[BytesLike]) -> object:
        if point == "in the middle of its file":
            return real(self, name, meanwhile(iter(pieces)))
        record = real(self, name, pieces)
        lost()
        return record

    monkeypatch.setattr(Store, "write", write)
    part = StoredTensor("w", "F32", (1,), np.zeros(4, dtype=np.uint8))
    with pytest.raises(LeaseLost):
        commit(own.ticket, "model-00001-of-00001.safetensors", Payload((part,)))
    assert not store.below(".swsc/done").names()
    assert bool(store.names()) == (point == "after its file")
    own.release()
