"""Faults between an object store and a run end in the right bytes or in a clear error, never in other weights."""

import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.errors import CredentialsRefused, StoreError
from pipeline.storage import object_stores as object_files
from pipeline.storage import repeated_reads
from pipeline.storage.object_stores import PATIENCE
from pipeline.storage.store import Store
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import BUCKET, as_client, object_store, stored, upload
from tests.support.tiny import contents, make_tiny_model

FLAGS = ["--bits", "4", "--local"]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    with object_store(tmp_path_factory.mktemp("s3")) as server, mock.patch.object(object_files, "_ATTEMPTS", 2):
        proxy = FaultProxy(server.ports["s3"])
        there = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        with as_client(dataclasses.replace(server, environment=there), alone=True):
            yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def models(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Address of a model in the store, and its right output."""
    folder = tmp_path_factory.mktemp("model")
    local = make_tiny_model(folder / "tiny", layers=2)
    assert main(["compress", str(local), str(folder / "right"), *FLAGS]) == 0
    return upload(local, f"{BUCKET}/tiny"), contents(folder / "right")


@pytest.fixture(autouse=True)
def _mended(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(repeated_reads, "_PAUSE_SECONDS", (0.0,) * 7)
    monkeypatch.setattr(object_files, "_PAUSE", 0.05)
    monkeypatch.setitem(PATIENCE, CredentialsRefused, 5.0)
    yield
    proxy.strike("")


# mode -> from which request on, how often: some requests are of the headers, more of the weights, and then of the
# output
PASSING = {
    "flip": (0, 9), "flip same": (20, 30), "flip small": (20, 9), "cut": (10, 5), "length": (0, 3), "refuse": (30, 20),
    "busy": (20, 5), "flip up": (0, 3),
}  # fmt: skip


@pytest.mark.parametrize("mode", PASSING)
def test_a_fault_that_passes_ends_in_the_right_bytes_or_in_a_failure_that_is_mended_by_the_same_command(
    mode: str, proxy: FaultProxy, models: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, right = models
    output = f"{BUCKET}/passing-{mode.replace(' ', '-')}"
    proxy.strike(mode, *PASSING[mode])
    code = main(["compress", source, output, *FLAGS])
    error = capsys.readouterr().err
    assert proxy.spoiled
    proxy.strike("")
    if code:
        assert error.splitlines()[-1].startswith("error: ")
        assert main(["compress", source, output, *FLAGS]) == 0
    assert stored(output) == right
    assert code == 0 or mode.startswith("flip") or mode == "length", error


@pytest.mark.parametrize("mode", ["flip", "refuse"])
def test_a_fault_that_stays_is_one_line_and_no_output(
    mode: str, proxy: FaultProxy, models: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(PATIENCE, CredentialsRefused, 0.2)
    source, right = models
    output = f"{BUCKET}/staying-{mode.replace(' ', '-')}"
    proxy.strike(mode, after=60)
    code, line = main(["compress", source, output, *FLAGS]), capsys.readouterr().err.splitlines()[-1]
    assert proxy.spoiled
    proxy.strike("")
    assert code in (1, 2), line
    assert ("refuses these credentials" if mode == "refuse" else "repeated readings") in line
    assert not Store.at(output).exists(MANIFEST)
    assert main(["compress", source, output, *FLAGS]) == 0
    assert stored(output) == right


def test_an_upload_that_arrives_as_other_bytes_is_refused(proxy: FaultProxy) -> None:
    store = Store.at(f"{BUCKET}/uploads")
    proxy.strike("flip up")
    with pytest.raises(StoreError):
        store.write("file", [bytes(50_000)])
    proxy.strike("")
    assert not store.exists("file")


def test_an_object_whose_etag_is_no_md5_is_read_back(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with encryption by a key of the store (SSE-KMS)."""
    monkeypatch.setattr(object_files, "_etag", lambda file: '"0123456789abcdef0123456789abcdef"')
    store = Store.at(f"{BUCKET}/encrypted")
    assert store.write("file", [b"content"]).size == 7
    monkeypatch.setattr(Store, "sha256", lambda self, name: "other")
    with pytest.raises(StoreError, match="stored bytes differ"):
        store.write("file", [b"content"])
    assert not store.exists("file")


def test_read_once_asks_for_each_byte_once(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.at(f"{BUCKET}/twice")
    store.write("file", [bytes(3_000_000)])

    def sent() -> int:
        before = proxy.sent
        object_files.ObjectFiles("s3").read("models/twice/file", 100_000, 2_000_000)
        return proxy.sent - before

    assert 4_000_000 < sent() < 4_100_000
    monkeypatch.setenv(object_files.READ_ONCE, "1")
    assert 2_000_000 < sent() < 2_100_000
