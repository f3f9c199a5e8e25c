"""A directory of files that are read by byte ranges and appear whole or not at all.

Local directories for now; every path below a store is relative to its root and may not leave it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from pipeline.errors import UserError

CHUNK = 8 << 20  # bytes of one read or write of a stream: large against latency, small against memory
TEMPORARY = ".partial"


@dataclass(frozen=True)
class FileRecord:
    """What stands in a file that is complete."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Store:
    """A directory, by its absolute path; a value, so that workers on other nodes can hold it too."""

    root: str

    @classmethod
    def at(cls, location: str) -> "Store":
        """The store at a local path; raises UserError for an address that is not one."""
        if "://" in location:
            raise UserError(f"{location}: only local paths are read and written so far; mount or copy it first")
        return cls(os.path.abspath(location))

    def path(self, name: str) -> Path:
        """Absolute path of `name`; raises UserError if it would leave the directory."""
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise UserError(f"{self.root}: file name {name!r} points outside the directory; repair the index")
        return Path(self.root, name)

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def is_empty(self) -> bool:
        """Whether the directory holds nothing, or is not there."""
        return not self.path(".").exists() or not any(self.path(".").iterdir())

    def names(self) -> list[str]:
        """Names of the files directly in the directory, sorted."""
        root = Path(self.root)
        return sorted(entry.name for entry in root.iterdir() if entry.is_file()) if root.is_dir() else []

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes [start, start + length) of a file; fewer if it ends before."""
        with open(self.path(name), "rb", buffering=0) as file:
            data = bytearray(self.size(name) - start if length is None else length)
            file.seek(start)
            filled, view = 0, memoryview(data)
            while filled < len(data) and (count := file.readinto(view[filled:])):
                filled += count
            del view
        del data[filled:]
        return data

    def stream(self, name: str, start: int, length: int) -> Iterator[bytearray]:
        """The same bytes as `read`, in pieces of CHUNK."""
        for offset in range(start, start + length, CHUNK):
            yield self.read(name, offset, min(CHUNK, start + length - offset))

    def write(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> FileRecord:
        """Write a file of the given pieces; under `name` it is whole and durable, or not there."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{uuid4().hex[:8]}{TEMPORARY}")  # two writers must not share one
        digest, size = hashlib.sha256(), 0
        with open(temporary, "wb", buffering=0) as file:
            for piece in pieces:
                _write_all(file.fileno(), memoryview(piece).cast("B"))
                digest.update(piece)
                size += memoryview(piece).nbytes
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
        return FileRecord(name, size, digest.hexdigest())

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write `value` as JSON with sorted keys: equal values give equal bytes."""
        return self.write(name, [json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"])

    def read_json(self, name: str) -> Any:
        return json.loads(bytes(self.read(name)).decode())

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self.stream(name, 0, self.size(name)):
            digest.update(piece)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Free bytes on the disk that the directory lies on, or would lie on."""
        existing = Path(self.root)
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
