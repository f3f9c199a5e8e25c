"""Models and outputs in both kinds of object store.

The bytes are those of a disk, whatever their clients do differently.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.sources.small_files import small_files
from pipeline.storage import object_stores as object_files
from pipeline.storage.filesystems import files_at
from pipeline.storage.store import Store
from tests.support import google_store, object_store
from tests.support.tiny import contents


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a bucket of a server, of which this process is a client."""
    if request.param == "gs":
        with google_store.google_store():
            yield google_store.BUCKET
    else:
        with (
            object_store.object_store(tmp_path_factory.mktemp("s3")) as server,
            object_store.as_client(server, alone=True),
        ):
            yield object_store.BUCKET


@pytest.fixture(scope="module")
def remote_model(bucket: str, tiny_model: Path) -> str:
    return object_store.upload(tiny_model, f"{bucket}/tiny")


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("local") / "out"
    assert main(["compress", str(tiny_model), str(output), "--local", "--bits", "4"]) == 0
    return contents(output)


def test_bytes_do_not_depend_on_the_locations_of_model_and_output(
    tiny_model: Path, bucket: str, remote_model: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for source, output in [
        (str(tiny_model), f"{bucket}/from-local"), (remote_model, f"{bucket}/from-remote"),
        (remote_model, str(tmp_path / "out")),
    ]:  # fmt: skip
        assert main(["compress", source, output, "--local", "--bits", "4"]) == 0
        assert object_store.stored(output) == expected
        assert main(["verify", output, "--local"]) == 0
        assert not Store.at(output).exists(".swsc/run.json")
        assert not Store.at(output).below(".swsc/done").names()


def test_files_of_folders_are_copied_from_and_to_a_store(tiny_model: Path, bucket: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name in ("additional_chat_templates/tool_use.jinja", "original/params.json", "code/inner/own.py"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text("pass")
    source = object_store.upload(model, f"{bucket}/folders")
    checkpoint = open_checkpoint(source)
    assert {"additional_chat_templates/tool_use.jinja", "code/inner/own.py"} <= set(checkpoint.extras)
    assert [one.name for one in checkpoint.ignored_files] == ["original/"]
    assert Path(small_files(source), "additional_chat_templates/tool_use.jinja").read_text() == "pass"
    assert main(["compress", source, f"{bucket}/with-folders", "--local", "--bits", "4"]) == 0
    assert Store.at(f"{bucket}/with-folders").read("code/inner/own.py") == b"pass"
    assert main(["verify", f"{bucket}/with-folders", "--local"]) == 0


def test_a_run_in_an_object_store_goes_on_where_it_was_cut_off(
    bucket: str, remote_model: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = object_files.ObjectFiles.write

    def write(self: Any, path: str, pieces: Any) -> None:
        if path.endswith(".safetensors"):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path)
        real(self, path, pieces)

    monkeypatch.setattr(object_files.ObjectFiles, "write", write)
    command = ["compress", remote_model, f"{bucket}/cut", "--local", "--bits", "4"]
    assert main(command) == 130
    assert not Store.at(f"{bucket}/cut").exists("config.json")
    monkeypatch.undo()
    assert main(command) == 0
    assert object_store.stored(f"{bucket}/cut") == expected


def test_damage_is_found_and_named(bucket: str, remote_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"{bucket}/damaged"
    assert main(["compress", remote_model, output, "--local", "--bits", "4"]) == 0
    store = Store.at(output)
    file = next(name for name in store.names() if name.endswith(".safetensors"))
    data = store.read(file)
    data[-1] ^= 1
    store.write(file, [data])
    capsys.readouterr()
    assert main(["verify", output, "--local"]) == 1
    assert file in capsys.readouterr().err


def test_an_object_whose_source_breaks_off_is_not_there(bucket: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(6 << 20)
        raise ValueError("the source breaks off")

    store = Store.at(f"{bucket}/broken")
    with pytest.raises(ValueError, match="breaks off"):
        store.write("half", pieces())
    assert store.names() == []


def test_a_folder_is_listed_sized_and_removed_with_what_is_in_it(bucket: str) -> None:
    store = Store.at(f"{bucket}/folder")
    store.write("one", [b"1", b"23"])
    store.write("below/two", [b"4"])
    assert store.entries() == {"one": True, "below": False}
    assert store.size("one") == 3
    assert store.read("one", 1, 2) == b"23"
    store.remove("below")
    assert store.names() == ["one"]
    assert not store.exists("below/two")


def test_a_store_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(object_files, "_RETRY_TIME", object_files._RETRY_TIME / 60)
    files_at.cache_clear()
    try:
        assert main(["plan", "gs://models/tiny"]) == 1
    finally:
        monkeypatch.undo()
        files_at.cache_clear()
    error = capsys.readouterr().err
    assert error.startswith("error: gs://models/tiny")
    assert error.count("\n") == 1
