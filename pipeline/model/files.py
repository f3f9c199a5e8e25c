"""Where bytes lie: a local disk, or an object store through pyarrow. store.py is what the rest of the house talks to.

Both keep one promise: under its name a file is whole, or not there. A disk keeps it by a temporary name, fsync and rename; an
object store by itself, because an object appears when its upload is completed. Endpoint, region and credentials of a store come
from the environment or from its own configuration files, as its clients read them, and are never written anywhere.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

from pipeline.errors import StoreError

TEMPORARY = ".partial"
_ATTEMPTS = 6  # of one request to an object store, with growing pauses and jitter between them
_CONNECT_SECONDS, _REQUEST_SECONDS = 10.0, 60.0
_RETRY_TIME = timedelta(seconds=60)  # of a request to Google's store, whose client counts time in place of attempts

Bytes = bytes | bytearray | memoryview


class Files(Protocol):
    """What a store is asked for; paths are absolute, without the scheme."""

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder."""

    def children(self, path: str) -> dict[str, bool]:
        """Name of everything directly in a folder -> whether it is a file; nothing if the folder is not there."""

    def read(self, path: str, start: int, length: int) -> bytearray:
        """Bytes [start, start + length) of a file; fewer if it ends before."""

    def write(self, path: str, pieces: Iterable[Bytes]) -> None:
        """Write a file; when this returns it is durable, and until then it is not there."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one. An object store cannot tell: there it is written in any case."""

    def locked(self, path: str) -> AbstractContextManager[None]:
        """Keeps other processes out that lock the same folder, where the disk has locks. An object store has none."""

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""

    def remove_empty(self, path: str) -> None:
        """Remove a folder in which there is nothing."""

    def free_bytes(self, path: str) -> int | None:
        """Free bytes of the disk that a path lies on, or would lie on; None if there is no limit."""


class LocalFiles:
    """A disk, or a filesystem that all nodes mount."""

    def size(self, path: str) -> int | None:
        return os.stat(path).st_size if os.path.isfile(path) else None

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def children(self, path: str) -> dict[str, bool]:
        try:
            return {entry.name: entry.is_file() for entry in os.scandir(path)}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, path: str, start: int, length: int) -> bytearray:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return _filled(length, file.readinto)

    def write(self, path: str, pieces: Iterable[Bytes]) -> None:
        target = Path(path)
        _make_directory(target.parent)
        temporary = f"{path}.{uuid4().hex[:8]}{TEMPORARY}"  # two writers must not share one
        try:
            with open(temporary, "wb", buffering=0) as file:
                for piece in pieces:
                    _write_all(file.fileno(), memoryview(piece).cast("B"))
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_directory(target.parent)

    def create(self, path: str, data: bytes) -> bool:
        _make_directory(Path(path).parent)
        try:
            with open(path, "xb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(data))
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    @contextmanager
    def locked(self, path: str) -> Iterator[None]:
        descriptor = None
        while descriptor is None:
            _make_directory(Path(path))
            with suppress(FileNotFoundError):  # whoever was done here has removed it just now
                descriptor = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network disk without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def remove(self, path: str) -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def remove_empty(self, path: str) -> None:
        with suppress(OSError):
            os.rmdir(path)

    def free_bytes(self, path: str) -> int | None:
        existing = Path(path)
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free


def _filled(length: int, read_into: Callable[[memoryview], int | None]) -> bytearray:
    """Up to `length` bytes, by as many calls as it takes."""
    data = bytearray(max(0, length))
    filled, view = 0, memoryview(data)
    while filled < len(data) and (count := read_into(view[filled:])):
        filled += count
    view.release()
    del data[filled:]
    return data


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _make_directory(path: Path) -> None:
    """Make a directory and those above it, so that each survives a power cut."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectFiles:
    """An object store; folders are no more than beginnings of names."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._system = _connected(scheme)
        # Google's client fails for want of an object that stands for the folder; S3's would put one there instead.
        self._delete_folder = self._system.delete_dir_contents if scheme == "gs" else self._system.delete_dir

    def size(self, path: str) -> int | None:
        info = self._try(path, self._system.get_file_info, path)
        return int(info.size) if info.is_file else None

    def is_folder(self, path: str) -> bool:
        return bool(self.children(path))

    def children(self, path: str) -> dict[str, bool]:
        from pyarrow.fs import FileSelector

        # Google's client names no folders, and asks for all that is below in any case: they are seen by what is in them.
        deep = self._scheme == "gs"
        selector = FileSelector(path, allow_not_found=True, recursive=deep)
        found = {}
        for info in self._try(path, self._system.get_file_info, selector):
            name, _, below = info.path.removeprefix(f"{path}/").partition("/")
            found[name] = info.is_file and not below
        return found

    def read(self, path: str, start: int, length: int) -> bytearray:
        with self._try(path, self._system.open_input_file, path) as file:
            file.seek(start)
            return _filled(min(length, file.size() - start), partial(self._try, path, file.readinto))

    def write(self, path: str, pieces: Iterable[Bytes]) -> None:
        out = self._try(path, self._system.open_output_stream, path)
        try:
            for piece in pieces:
                self._try(path, out.write, memoryview(piece).cast("B"))
        except BaseException:
            with suppress(OSError):
                out.close()  # which completes what was sent, as would the end of `out`
            with suppress(StoreError):
                self.remove(path)
            raise
        self._try(path, out.close)  # if this fails nothing has appeared, and what was there before is there still

    def create(self, path: str, data: bytes) -> bool:
        self.write(path, [data])
        return True

    def locked(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def remove(self, path: str) -> None:
        if self.size(path) is not None:
            self._try(path, self._system.delete_file, path)
        elif self.children(path):
            self._try(path, self._delete_folder, path)

    def remove_empty(self, path: str) -> None:
        pass  # there are no folders

    def free_bytes(self, path: str) -> int | None:
        return None

    def _try(self, path: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the client; what it raises becomes one line that names the object."""
        try:
            return call(*arguments)
        except (OSError, ValueError) as error:  # ArrowInvalid is one of the latter
            raise StoreError(
                f"{self._scheme}://{path}: {' '.join(str(error).split())}; check the address, and endpoint, region and"
                " credentials in the environment"
            ) from None


def _connected(scheme: str) -> Any:
    import pyarrow.fs as arrow

    if scheme == "gs":
        emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))  # as Google's own clients have it
        instead = {"anonymous": True, "scheme": emulator.scheme, "endpoint_override": emulator.netloc}
        return arrow.GcsFileSystem(retry_time_limit=_RETRY_TIME, **(instead if emulator.netloc else {}))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    return arrow.S3FileSystem(
        endpoint_override=endpoint, region=region,
        retry_strategy=arrow.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS, request_timeout=_REQUEST_SECONDS,
    )  # fmt: skip


SCHEMES = ("s3", "gs")


@lru_cache
def files_at(scheme: str) -> Files:
    """The files of a scheme, "" for the local disk; a process connects once."""
    return ObjectFiles(scheme) if scheme else LocalFiles()
