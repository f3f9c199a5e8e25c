"""Texts and caches in S3, a server that dies, messages, and bytes read (both kinds of stores: test_both_stores.py)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.errors import StoreError
from pipeline.planning.plan import make_plan
from pipeline.settings.matrix import MatrixSettings
from pipeline.storage import object_stores as object_files
from pipeline.storage import paths as places
from pipeline.storage.filesystems import files_at
from pipeline.storage.store import Store
from tests.support.object_store import BUCKET, ObjectStore, as_client, object_store, stored, upload
from tests.support.offline_tasks import findings, make_tasks
from tests.support.tiny import contents, make_text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    attempts = mock.patch.object(object_files, "_ATTEMPTS", 2)
    with attempts, object_store(tmp_path_factory.mktemp("s3")) as running, as_client(running, alone=True):
        yield running


@pytest.fixture(scope="module")
def remote_model(server: ObjectStore, tiny_model: Path) -> str:
    return upload(tiny_model, f"{BUCKET}/tiny")


def test_an_object_whose_server_dies_during_the_upload_is_not_there(server: ObjectStore) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(12 << 20)
        server.kill()
        yield bytes(12 << 20)

    store = Store.at(f"{BUCKET}/cut")
    try:
        with pytest.raises(StoreError, match="check the address"):
            store.write("large", pieces())
    finally:
        server.start_again()
    assert not store.exists("large")


def test_no_more_is_read_than_the_tensors_that_are_needed(remote_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's headers and fingerprint are large beside its weights, and are counted separately."""
    ranges: list[int] = []
    real = object_files.ObjectFiles.read

    def read(self: Any, path: str, start: int, length: int) -> bytearray:
        data = real(self, path, start, length)
        ranges.append(len(data))
        return data

    monkeypatch.setattr(object_files.ObjectFiles, "read", read)
    source = open_checkpoint(remote_model)
    headers, ranges[:] = sum(ranges), []
    plan = make_plan(source, MatrixSettings(bits=4))
    assert main(["compress", remote_model, f"{BUCKET}/counted", "--local", "--bits", "4"]) == 0
    weights = sum(task.nbytes for task in plan.layers) + sum(task.nbytes for task in plan.copies)
    own = sum(source.store.size(name) for name in source.extras)
    written = Store.at(f"{BUCKET}/counted")
    again = sum(written.size(name) for name in written.names() if name.endswith(".safetensors")) // 4  # their headers
    assert weights <= sum(ranges) <= weights + headers + own + again


def test_texts_caches_and_results_may_be_in_the_store(remote_model: str, tiny_model: Path, tmp_path: Path) -> None:
    calibration, text = make_text(tmp_path / "calibration.txt", 1500, seed=77), make_text(tmp_path / "text.txt", seed=5)
    there = Store.at(f"{BUCKET}/texts")
    for path in (calibration, text):
        there.write(path.name, [path.read_bytes()])
    flags = ["--preset", "best", "--bits", "3", "--calibration-windows", "6", "--calibration-seqlen", "32", "--local"]
    remote = ["compress", remote_model, f"{BUCKET}/best", "--calibration", f"{there.root}/calibration.txt", *flags]
    local = ["compress", str(tiny_model), str(tmp_path / "best"), "--calibration", str(calibration), *flags]
    assert main(remote) == 0
    assert main(local) == 0
    names = {"swsc_calibration.json", "swsc_manifest.json"}  # which name the text, by its place
    here, far = contents(tmp_path / "best"), stored(f"{BUCKET}/best")
    assert {n: b for n, b in far.items() if n not in names} == {n: b for n, b in here.items() if n not in names}
    assert [name for name in Store.at(f"{BUCKET}/.swsc-cache").entries() if name.startswith("moments-")]
    results = [f"{BUCKET}/results/far.json", str(tmp_path / "near.json")]
    for model, name in ((f"{BUCKET}/best", results[0]), (str(tmp_path / "best"), results[1])):
        evaluation = [
            "evaluate",
            model,
            "--text",
            f"{there.root}/text.txt",
            "--seqlen",
            "64",
            "--json",
            name,
            "--local",
        ]
        assert main(evaluation) == 0
    far_result, near_result = (Store.at(name).parent.read_json(Store.at(name).name) for name in results)
    assert far_result["nll_per_window"] == near_result["nll_per_window"]


def test_tasks_of_lm_eval_find_the_same_there(remote_model: str, tiny_model: Path, tmp_path: Path) -> None:
    tasks = ["--tasks", "tiny_group,tiny_write", "--include-path", str(make_tasks(tmp_path / "tasks")), "--local"]
    assert main(["evaluate", remote_model, *tasks, "--json", f"{BUCKET}/results/tasks.json"]) == 0
    assert main(["evaluate", str(tiny_model), *tasks, "--json", str(tmp_path / "tasks.json")]) == 0
    far, near = (
        place.parent.read_json(place.name)["lm_eval"]
        for place in (Store.at(f"{BUCKET}/results/tasks.json"), Store.at(str(tmp_path / "tasks.json")))
    )
    assert findings(far) == findings(near)


def test_a_wrong_secret_is_one_error_line_that_does_not_contain_it(
    remote_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    files_at.cache_clear()
    try:
        assert main(["plan", remote_model]) == 1
    finally:
        monkeypatch.undo()
        files_at.cache_clear()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {BUCKET}/tiny")
    assert error.count("\n") == 1
    assert "ACCESS_DENIED" in error or "AccessDenied" in error or "SIGNATURE_DOES_NOT_MATCH" in error
    assert "not-the-secret" not in error
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in error


def test_the_error_of_an_unknown_scheme_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "ftp://host/model"]) == 2
    assert "give a local path, s3://BUCKET/…, gs://BUCKET/…" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["made", "made/", "/made", "made//", "made/new", "/made//new/", ""])
def test_a_prefix_that_is_read_is_not_written_to(server: ObjectStore, remote_model: str, way: str) -> None:
    made = f"{BUCKET}/made"
    if not Store.at(made).is_there:
        assert main(["compress", remote_model, made, "--local", "--bits", "4"]) == 0
    before = stored(made)
    assert main(["restore", made, f"{BUCKET}/{way}", "--local", "--overwrite"]) == 2
    assert main(["compress", f"{made}/", f"{BUCKET}/{way}", "--local", "--overwrite"]) == 2
    assert stored(made) == before
    assert not Store.at(f"{made}/new").is_there


def test_names_that_begin_alike_are_two_places(server: ObjectStore, remote_model: str) -> None:
    assert main(["compress", remote_model, f"{remote_model}-4", "--local", "--bits", "4"]) == 0
    assert main(["compress", remote_model, remote_model[:-1], "--local", "--bits", "4"]) == 0


def test_a_bucket_under_another_name_is_known_by_what_appears_in_it(
    server: ObjectStore, remote_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an alias, which no comparison of addresses can know."""
    made = f"{BUCKET}/aliased"
    assert main(["compress", remote_model, made, "--local", "--bits", "4"]) == 0
    before = stored(made)
    monkeypatch.setattr(places, "contains", lambda outer, inner: False)
    assert main(["restore", made, made, "--local", "--overwrite"]) == 2
    assert stored(made) == before
    assert not Store.at(f"{made}/.swsc").is_there
