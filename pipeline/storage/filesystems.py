"""Where bytes lie: a local disk, or an object store (object_files.py). store.py is what the rest of the house talks to.

Both keep one promise: under its name a file is whole, or not there. A disk keeps it by a temporary name, fsync and rename; an
object store by itself, because an object appears when its upload is completed.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from pipeline.storage.etag import PartDigest

TEMPORARY = ".partial"
_TEMPORARY_NAME = re.compile(r"(.+)\.[0-9a-f]{8}" + re.escape(TEMPORARY))

# What file systems answer that sync no folders: shared folders of virtual machines, older SMB clients, some of FUSE.
_NO_SUCH_CALL = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)

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

    def content_proved(self, path: str, digest: PartDigest) -> bool:
        """Whether a file's content is surely what `digest` has seen, without reading it."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one. An object store cannot tell: there it is written in any case."""

    def locked(self, path: str) -> AbstractContextManager[None]:
        """Keeps other processes out that lock the same folder, where the disk has locks. An object store has none."""

    def remove(self, path: str) -> None:
        """Remove a file, a link itself, or a folder with all that is in it, if it is there."""

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
            return filled(length, file.readinto)

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
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError):
                error.filename = error.filename or path  # a write itself does not say where
            raise
        _sync_directory(target.parent)

    def content_proved(self, path: str, digest: PartDigest) -> bool:
        return True  # a disk that writes other bytes than it is given says so when they are read

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
        if os.path.isdir(path) and not os.path.islink(path):
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


def meant_by(temporary: str) -> str | None:
    """Name of the file that was being written under the name `temporary`; None if that is no such name."""
    match = _TEMPORARY_NAME.fullmatch(temporary)
    return match[1] if match else None


def filled(length: int, read_into: Callable[[memoryview], int | None]) -> bytearray:
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
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)


SCHEMES = ("s3", "gs")


@lru_cache
def files_at(scheme: str) -> Files:
    """The files of a scheme, "" for the local disk; a process connects once."""
    if not scheme:
        return LocalFiles()
    from pipeline.storage.object_stores import ObjectFiles

    return ObjectFiles(scheme)
