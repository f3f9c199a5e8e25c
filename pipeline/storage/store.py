"""A directory of files that are read by byte ranges and appear whole or not at all, on a disk or in an object store."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import OutputError, StoreError, UserError
from pipeline.storage.etag import EtagDigest
from pipeline.storage.files import BytesLike, Files
from pipeline.storage.filesystems import SCHEMES, files_at

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_JSON = 1 << 28  # bytes: a report of 100,000 tensors has a quarter of that
CHUNK = 8 << 20  # bytes of one read or write of a stream: large against latency, small against memory


@dataclass(frozen=True)
class FileRecord:
    """What stands in a file that is complete; `tensors`: sha256 of each tensor in it, by name."""

    name: str
    size: int
    sha256: str
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        """All but the name, as JSON."""
        own: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        return own | ({"tensors": dict(self.tensors)} if self.tensors else {})


@dataclass(frozen=True)
class Store:
    """A directory, by its absolute path or address; a value, so that workers on other nodes can hold it too."""

    root: str

    @classmethod
    def at(cls, location: str) -> "Store":
        """The store at a local path, s3://… or gs://…; raises UserError for another address, and for an empty one."""
        if not location:
            raise UserError("an empty path: it would be the current directory; give one, or . for that")
        scheme, separator, rest = location.partition("://")
        if not separator:
            return cls(_absolute(location))
        if scheme == "file":
            return cls(_absolute(re.sub(r"^localhost(?=/)", "", rest)))
        bucket = "/".join(part for part in rest.split("/") if part)  # a//b, which a client refuses, is meant as a/b
        if "@" in bucket:
            raise UserError(f"{scheme}://…: credentials do not belong into an address; give them by the environment")
        if scheme not in SCHEMES or not bucket:
            known = ", ".join(f"{name}://BUCKET/…" for name in SCHEMES)
            raise UserError(f"{location}: not an address that is read or written; give a local path, {known}")
        if {".", ".."} & set(bucket.split("/")):
            raise UserError(f"{location}: . and .. mean nothing in an object store, or another place; leave them out")
        return cls(f"{scheme}://{bucket}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    @property
    def parent(self) -> "Store":
        """The directory that this one stands in; that of a bucket is the bucket itself."""
        scheme, separator, rest = self.root.rpartition("://")
        above = os.path.dirname(rest)
        return Store(f"{scheme}{separator}{above}") if above else self

    @property
    def name(self) -> str:
        return os.path.basename(self.root)

    def below(self, name: str) -> "Store":
        """The store in a folder of this one."""
        return Store(f"{self.root}/{_inside(self.root, name)}")

    @property
    def _files(self) -> Files:
        return files_at(self.root.rpartition("://")[0])

    @property
    def _folder(self) -> str:
        return self.root.rpartition("://")[2]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{_inside(self.root, name)}"

    def _own_path(self, name: str) -> str:
        """`_path` of a file that is to be written or removed; OutputError if a link on the way leads somewhere else."""
        folder = os.path.dirname(name)
        if folder and self.is_link(folder):
            raise OutputError(f"{self.root}/{folder}: a link; nothing is written or removed through it; take it away")
        return self._path(name)

    def is_link(self, name: str) -> bool:
        """Whether a file or folder below the directory is a link, or is reached through one; the directory itself may be one."""
        parts = PurePosixPath(_inside(self.root, name)).parts
        ways = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return self.is_local and any(os.path.islink(f"{self._folder}/{way}") for way in ways)

    @property
    def is_there(self) -> bool:
        """Whether there is such a directory; one of an object store is there as soon as it holds something."""
        return self._files.is_folder(self._folder)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._files.size(self._path(name)) is not None

    def size(self, name: str) -> int:
        size = self._files.size(self._path(name))
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.root}/{name}")
        return size

    def entries(self) -> dict[str, bool]:
        """Name of everything directly in the directory -> whether it is a file; nothing if it is not there."""
        return self._files.children(self._folder)

    def names(self) -> list[str]:
        """Names of the files directly in the directory, sorted."""
        return sorted(name for name, is_file in self.entries().items() if is_file)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes [start, start + length) of a file, by default all from `start` on.

        Raises:
            StoreError: the file ends before, or the store gave less than it has.
        """
        length = self.size(name) - start if length is None else length
        data = self._files.read(self._path(name), start, length)
        if len(data) != length:
            raise StoreError(
                f"{self.root}/{name}: {len(data)} bytes at {start}, wanted {length}: read short, or cut off"
            )
        return data

    def stream(self, name: str, start: int, length: int) -> Iterator[bytearray]:
        """The same bytes as `read`, in pieces of CHUNK."""
        for offset in range(start, start + length, CHUNK):
            yield self.read(name, offset, min(CHUNK, start + length - offset))

    def write(self, name: str, pieces: Iterable[BytesLike]) -> FileRecord:
        """Write a file of the given pieces; under `name` it is whole and durable, or not there.

        Raises:
            StoreError: what lies there afterwards is not what was written.
        """
        digest, parts, size = hashlib.sha256(), EtagDigest(), 0

        def seen() -> Iterator[BytesLike]:
            nonlocal size
            for piece in pieces:
                digest.update(piece)
                if not self.is_local:
                    parts.update(piece)
                size += memoryview(piece).nbytes
                yield piece

        self._files.write(self._own_path(name), seen())
        if (there := self._files.size(self._path(name))) != size:
            self.remove(name)
            raise StoreError(f"{self.root}/{name}: {there} bytes lie there after {size} were written; look at the disk")
        if not self._files.content_proved(self._path(name), parts) and self.sha256(name) != digest.hexdigest():
            self.remove(name)
            raise StoreError(
                f"{self.root}/{name}: other bytes lie there than were written; what lies between corrupts what it carries"
            )
        return FileRecord(name, size, digest.hexdigest())

    def put(self, name: str, data: bytes) -> None:
        """Write a small file that others may write, too: what lies there afterwards may be theirs."""
        self._files.write(self._own_path(name), [data])

    def create(self, name: str, data: bytes) -> bool:
        """`put`, unless there is such a file: then False. An object store cannot tell, and writes in any case."""
        return self._files.create(self._own_path(name), data)

    def locked(self) -> AbstractContextManager[None]:
        """Keeps others of this disk out while a decision is made; a store that has no locks keeps nobody out."""
        return self._files.locked(self._folder)

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write `value` as JSON with sorted keys: equal values give equal bytes."""
        return self.write(name, [json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"])

    def read_json(self, name: str, most: int = _MOST_JSON) -> Any:
        """The value of a JSON file; ValueError if it is none, or has more than `most` bytes."""
        if (size := self.size(name)) > most:
            raise ValueError(f"{size:,} bytes, at most {most:,} are read")
        text = bytes(self.read(name)).decode()
        try:
            value = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if _SURROGATE.search(text):  # as an escape: halves of a letter, which nothing could write again, or a whole one
            _require_text(value)
        return value

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self.stream(name, 0, self.size(name)):
            digest.update(piece)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with all that is in it, if it is there; what links lead to stays."""
        self._files.remove(self._own_path(name))

    def remove_empty(self) -> None:
        """Remove the directory if there is nothing in it."""
        self._files.remove_empty(self._folder)

    def free_bytes(self) -> int | None:
        """Free bytes on the disk that the directory lies on, or would lie on; None if there is no limit."""
        return self._files.free_bytes(self._folder)


def require_free_space(store: Store, nbytes: int) -> None:
    """Raise OutputError if the store's disk has not that many bytes free."""
    free = store.free_bytes()
    if free is not None and nbytes > free:
        raise OutputError(
            f"{store.root}: {nbytes:,} bytes are needed, {free:,} are free on its disk; free some or choose another"
        )


def _require_text(value: Any) -> None:
    """Raise ValueError for a string that holds an unpaired surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds letters that are none (lone surrogates)") from None


def is_inside(name: str) -> bool:
    """Whether a name stays in the directory that it is looked for in, links aside."""
    pure = PurePosixPath(name)
    return bool(pure.parts) and not (pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name)


def _inside(root: str, name: str) -> str:
    """`name`; raises UserError if it would leave the directory."""
    if not is_inside(name):
        raise UserError(f"{root}: file name {name!r} points outside the directory; repair the index")
    return name


def _absolute(path: str) -> str:
    """An absolute path; `..` leads where the system takes it to, above what a link leads to."""
    parts = path.split("/")
    if ".." not in parts:
        return os.path.abspath(path)
    after = len(parts) - parts[::-1].index("..")
    return os.path.abspath(os.path.join(os.path.realpath("/".join(parts[:after])), *parts[after:]))
