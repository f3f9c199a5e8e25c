"""A local disk, or a file system that all nodes mount."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pipeline.storage.etag import EtagDigest
from pipeline.storage.files import BytesLike, read_fully

TEMPORARY_SUFFIX = ".partial"
_TEMPORARY_NAME = re.compile(r"(.+)\.[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))

# What file systems answer that sync no folders: shared folders of virtual machines, older SMB clients, some of FUSE.
_NO_SUCH_CALL = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)


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
            return read_fully(length, file.readinto)

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        target = Path(path)
        _make_directory(target.parent)
        temporary = f"{path}.{uuid4().hex[:8]}{TEMPORARY_SUFFIX}"  # two writers must not share one
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

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
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


def final_name(temporary: str) -> str | None:
    """Name of the file that was being written under the name `temporary`; None if that is no such name."""
    match = _TEMPORARY_NAME.fullmatch(temporary)
    return match[1] if match else None


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
