"""What of a directory an output may replace or remove: its own files, and nothing that a link leads to."""

import json
import os
from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.errors import OutputError
from pipeline.outputs.owned_files import WRITTEN, clear, clear_unfinished, owned, require_no_others
from pipeline.storage.store import Store


def fill(folder: Path, *names: str) -> Store:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return Store.at(str(folder))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_removed_with_the_folders_that_are_empty_then(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", "a/b/c.json", "a/d.json")
    clear(store, {"a/b/c.json"})
    assert sorted(store.entries()) == ["a"]
    assert store.below("a").entries() == {"d.json": True}
    clear(store, {"a/d.json"})
    assert store.entries() == {}


def test_nothing_is_removed_behind_a_link_or_outside(tmp_path: Path) -> None:
    fill(tmp_path / "source", "vocab.json")
    store = fill(tmp_path / "out", "x.json", "folder/inner.json")
    os.symlink(tmp_path / "source", tmp_path / "out" / "tokenizer")
    os.symlink(tmp_path / "source" / "vocab.json", tmp_path / "out" / "linked.json")
    outside = {"../source/vocab.json", str(tmp_path / "source/vocab.json"), ".", "/", "folder", ""}
    clear(store, {"tokenizer/vocab.json", "tokenizer", "linked.json", *outside})
    clear_unfinished(store, outside)
    assert files(tmp_path) == {"source/vocab.json", "out/x.json", "out/folder/inner.json"}
    assert not os.path.lexists(tmp_path / "out" / "linked.json")  # a link itself is what the name stood for


def test_unfinished_files_are_those_that_writers_of_listed_ones_leave(tmp_path: Path) -> None:
    mine = ("thesis.partial", "model-00001-of-00002.safetensors.partial", "thesis.0123abcd.partial", "folder/a.partial")
    store = fill(tmp_path, *mine, "config.json.0123abcd.partial", "folder/a.json.ffffffff.partial")
    clear_unfinished(store, {"config.json", "folder/a.json", "model-00001-of-00002.safetensors"})
    assert files(tmp_path) == set(mine)


def test_a_file_that_nothing_lists_is_not_replaced(tmp_path: Path) -> None:
    store = fill(
        tmp_path, MANIFEST, "model-00001-of-00001.safetensors", "model-00002-of-00009.safetensors", "notes.txt"
    )
    about = {"size": 1, "sha256": ""}
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {"model-00001-of-00001.safetensors": about}}))
    require_no_others(store, ["model-00001-of-00001.safetensors", "config.json"])
    for name in ("model-00002-of-00009.safetensors", "notes.txt"):
        assert name not in owned(store)
        with pytest.raises(OutputError, match=name):
            require_no_others(store, [name])
    store.write_json(WRITTEN, ["notes.txt"])  # a run that was cut off wrote it
    require_no_others(store, ["notes.txt"])


def test_a_link_and_a_folder_of_a_name_that_is_to_be_written_are_others_too(tmp_path: Path) -> None:
    store = fill(tmp_path, MANIFEST, "config.json/inner")
    (tmp_path / MANIFEST).write_text('{"files": {}}')
    os.symlink("nowhere", tmp_path / "tokenizer.json")
    for name in ("config.json", "tokenizer.json"):
        with pytest.raises(OutputError, match=name):
            require_no_others(store, [name])


def test_a_store_writes_and_removes_nothing_through_a_linked_folder(tmp_path: Path) -> None:
    fill(tmp_path / "source", "lease.json")
    store = fill(tmp_path / "out", "x")
    os.symlink(tmp_path / "source", tmp_path / "out" / ".swsc")
    for change in (
        lambda: store.write(".swsc/run.json", [b"x"]),
        lambda: store.put(".swsc/run.json", b"x"),
        lambda: store.create(".swsc/run.json", b"x"),
        lambda: store.remove(".swsc/lease.json"),
    ):
        with pytest.raises(OutputError, match=r"\.swsc: "):
            change()
    store.remove(".swsc")
    assert files(tmp_path) == {"source/lease.json", "out/x"}


def test_hard_links_are_never_written_through(tmp_path: Path) -> None:
    fill(tmp_path / "source", "config.json")
    (tmp_path / "out").mkdir()
    os.link(tmp_path / "source" / "config.json", tmp_path / "out" / "config.json")
    store = Store.at(str(tmp_path / "out"))
    store.write("config.json", [b"another"])
    assert (tmp_path / "source" / "config.json").read_text() == "config.json"
    assert not store.create("config.json", b"a third")
    store.remove("config.json")
    assert (tmp_path / "source" / "config.json").read_text() == "config.json"
