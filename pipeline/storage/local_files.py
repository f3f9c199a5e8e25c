"""Files on a local disk, or on a file system that all nodes mount."""

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

# Ending of the name of a file while it is written.
TEMPORARY_SUFFIX = ".partial"
_TEMPORARY_NAME = re.compile(r"(.+)\.[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))
# Error numbers of file systems that cannot sync a folder: shared folders of virtual machines, older SMB clients, some
# of FUSE.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)


class LocalFiles:
    """Implements `Files` for a disk."""

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
        # Two writers must not share a temporary file.
        temporary = f"{path}.{uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
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
                error.filename = error.filename or path  # os.write does not set it
            raise
        _sync_directory(target.parent)

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
        return True  # a disk reports damaged blocks when they are read

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
            with suppress(FileNotFoundError):  # another process has just removed the folder
                descriptor = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network file system without locks
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
    """Return the final name of a file that is written under the name `temporary`; None if it is no temporary name."""
    match = _TEMPORARY_NAME.fullmatch(temporary)
    return match[1] if match else None


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _make_directory(path: Path) -> None:
    """Create a directory and its parents durably: each survives a power failure."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Flush a directory, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
