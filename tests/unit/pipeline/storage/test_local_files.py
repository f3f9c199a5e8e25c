"""Claims about what is on a disk or in an object store, and when."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow
import pytest

from pipeline.errors import StoreError, StoreNotResponding, StoreOutage
from pipeline.storage import object_stores as object_files
from pipeline.storage.store import Store


def test_a_file_is_durable_before_it_appears_and_so_are_the_directories_that_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(("sync", os.path.relpath(path, tmp_path)))
        sync(descriptor)

    def rename(before: str, after: str) -> None:
        events.append(("rename", os.path.relpath(after, tmp_path)))
        replace(before, after)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    Store.at(str(tmp_path)).write("new/deep/file", [b"content"])
    assert events[:2] == [("sync", "."), ("sync", "new")], "each directory that was made, in the one above"
    assert events[2][0] == "sync"
    assert events[2][1].startswith("new/deep/file.")
    assert events[3:] == [("rename", "new/deep/file"), ("sync", "new/deep")]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_syncs_no_folders_is_written_to_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Folders that a virtual machine shares with its host answer EINVAL."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if code == errno.EIO else nullcontext():  # noqa: PT011
        assert Store.at(str(tmp_path)).write("new/file", [b"content"]).size == len(b"content")


class _Upload:
    """An upload whose end fails once for each of `failures`."""

    def __init__(self, inner: Any, failures: list[str]) -> None:
        self._inner, self._failures = inner, failures

    def write(self, data: Any) -> None:
        self._inner.write(bytes(data))

    def close(self) -> None:
        if self._failures:
            raise OSError(self._failures.pop())
        self._inner.close()


class _Client:
    """A store of objects: one appears when its upload is closed."""

    def __init__(self, folder: Path) -> None:
        self._inner = arrow.SubTreeFileSystem(str(folder), arrow.LocalFileSystem())
        self.failures: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_output_stream(self, path: str) -> Any:
        return _Upload(_Late(self._inner, path), self.failures)


class _Late:
    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path, self._data = system, path, b""

    def write(self, data: bytes) -> None:
        self._data += data

    def close(self) -> None:
        with self._system.open_output_stream(self._path) as out:
            out.write(self._data)


def test_an_object_whose_replacement_fails_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    client = _Client(tmp_path)
    monkeypatch.setattr(object_files, "_connect", lambda scheme: client)
    objects = object_files.ObjectFiles("s3")
    objects.write("bucket/lease", [b"first"])
    client.failures.append("the store does not answer")
    with pytest.raises(StoreError, match="s3://bucket/lease: the store does not answer"):
        objects.write("bucket/lease", [b"second"])
    assert objects.read("bucket/lease", 0, 5) == b"first"
    objects.write("bucket/lease", [b"third"])
    assert objects.read("bucket/lease", 0, 5) == b"third"


class _Down:
    """A client whose store answers once, and never again."""

    def __init__(self) -> None:
        self.requests = 0

    def get_file_info(self, path: str) -> Any:
        self.requests += 1
        if self.requests > 1:
            raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7")
        return arrow.FileInfo(path, arrow.FileType.File, size=7)


class _Clock:
    """Time that passes while somebody sleeps."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("patience", [0.0, 2.0])
def test_a_store_that_is_gone_is_waited_for_once_and_not_by_every_request(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _Down()
    monkeypatch.setattr(object_files, "_connect", lambda scheme: client)
    monkeypatch.setattr(object_files, "time", _Clock())
    monkeypatch.setitem(object_files.PATIENCE, StoreNotResponding, patience)
    objects = object_files.ObjectFiles("s3")
    assert objects.size("bucket/a") == 7
    for most in (4, 1):
        before = client.requests
        with pytest.raises(StoreOutage, match="s3://bucket/a: AWS Error NETWORK_CONNECTION"):
            objects.size("bucket/a")
        assert client.requests - before <= most
    with pytest.raises(StoreError) as first_contact:
        objects.size("other/a")
    assert not isinstance(first_contact.value, StoreOutage)


class _Listed:
    """A client whose listings are given."""

    def __init__(self, listings: list[str]) -> None:
        self.left = list(listings)

    def get_file_info(self, selector: Any) -> list[Any]:
        return [arrow.FileInfo(f"bucket/m/{name}", arrow.FileType.File, size=1) for name in self.left.pop(0).split()]


@pytest.mark.parametrize(
    ("listings", "expected"),
    [
        (["a b", "a b"], "a b"),
        (["a c", "a b", "a b"], "a b"),
        (["a b", "a", "a b", "a b"], "a b"),
        (["a 0", "a 0 1", "a 1 2", "a 2 3", "a 3 4", "a 4 5", "a 5 6"], "a"),  # others write and remove there
    ],
)
def test_over_plain_http_a_listing_counts_once_two_in_a_row_or_most_agree(
    listings: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    client = _Listed(listings)
    monkeypatch.setattr(object_files, "_connect", lambda scheme: client)
    assert sorted(object_files.ObjectFiles("s3").children("bucket/m")) == expected.split()
    assert not client.left


def test_over_https_a_folder_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")
    client = _Listed(["a", "b"])
    monkeypatch.setattr(object_files, "_connect", lambda scheme: client)
    assert list(object_files.ObjectFiles("s3").children("bucket/m")) == ["a"]


def test_an_object_called_like_a_fault_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def open_input_file(self, path: str) -> Any:
            raise FileNotFoundError(f"Path does not exist '{path}'")

    monkeypatch.setattr(object_files, "_connect", lambda scheme: Missing())
    with pytest.raises(StoreError) as found:
        object_files.ObjectFiles("s3").read("bucket/AccessDenied/SLOW_DOWN", 0, 1)
    assert type(found.value) is StoreError
