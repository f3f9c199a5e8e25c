"""What a store needs of a file system, and of an object store: one protocol for both.

Both keep one promise: under its name a file is complete, or absent. A local disk keeps it by a temporary name, fsync and
rename. An object store keeps it by itself, because an object appears when its upload is completed.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from pipeline.storage.etag import EtagDigest

BytesLike = bytes | bytearray | memoryview


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

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        """Write a file; when this returns it is durable, and until then it is not there."""

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
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


def read_fully(length: int, read_into: Callable[[memoryview], int | None]) -> bytearray:
    """Up to `length` bytes, by as many calls as it takes."""
    data = bytearray(max(0, length))
    read_fully, view = 0, memoryview(data)
    while read_fully < len(data) and (count := read_into(view[read_fully:])):
        read_fully += count
    view.release()
    del data[read_fully:]
    return data
