"""The operations that a store needs, as one protocol for file systems and object stores.

Both give one guarantee: a file under its name is complete, or absent. A local disk needs a temporary name, fsync and a
rename for that. In an object store an object appears when its upload completes.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from pipeline.storage.etag import EtagDigest

BytesLike = bytes | bytearray | memoryview


class Files(Protocol):
    """A file system or an object store. Paths are absolute and without the scheme."""

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""

    def is_folder(self, path: str) -> bool:
        """Whether the folder exists."""

    def children(self, path: str) -> dict[str, bool]:
        """Return name -> is a file, for everything directly in a folder; empty if the folder does not exist."""

    def read(self, path: str, start: int, length: int) -> bytearray:
        """Return the bytes [start, start + length) of a file; fewer if the file ends before."""

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        """Write a file. It appears when it is complete, and is durable when this returns."""

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
        """Whether the content of a file is known to match `digest` without reading it."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it exists; returns whether it was written. An object store always writes it."""

    def locked(self, path: str) -> AbstractContextManager[None]:
        """Lock a folder against other processes, where the disk has locks. An object store has none."""

    def remove(self, path: str) -> None:
        """Remove a file, a link itself, or a folder with its contents; does nothing if the path does not exist."""

    def remove_empty(self, path: str) -> None:
        """Remove a folder if it is empty."""

    def free_bytes(self, path: str) -> int | None:
        """Return the free bytes of the disk on which `path` is or would be created; None if there is no limit."""


def read_fully(length: int, read_into: Callable[[memoryview], int | None]) -> bytearray:
    """Call `read_into` until `length` bytes are read or it returns none; returns the bytes that were read."""
    data = bytearray(max(0, length))
    position, view = 0, memoryview(data)
    while position < len(data) and (count := read_into(view[position:])):
        position += count
    view.release()
    del data[position:]
    return data
