"""A directory on a disk or in an object store, whose files are read by byte ranges and written atomically."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.errors import OutputError, StoreError, UserError
from pipeline.storage.etag import EtagDigest
from pipeline.storage.files import BytesLike, Files
from pipeline.storage.filesystems import SCHEMES, files_at

if TYPE_CHECKING:  # the core imports torch, which takes seconds: help and mistakes of a command line show before
    from swsc_core.storage.json_fields import JsonObject

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Bytes of a JSON file that is read, at most. A report of 100,000 tensors has a quarter of that.
JSON_LIMIT = 1 << 28
# Bytes of one read of a stream: long compared with the latency of a request, small compared with memory.
CHUNK = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and digests of a complete file.

    Attributes:
        sha256: of the file.
        tensors: name -> sha256 of each tensor in it; empty for files without tensors.
    """

    name: str
    size: int
    sha256: str
    tensors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> "FileRecord":
        """Inverse of `to_json`, for the file `name`."""
        return cls(name, data["size"], data["sha256"], data.get("tensors", {}))

    def to_json(self) -> "JsonObject":
        """Return everything except the name, as it is written to manifests."""
        digests: JsonObject = {"size": self.size, "sha256": self.sha256}
        return {**digests, "tensors": dict(self.tensors)} if self.tensors else digests


@dataclass(frozen=True)
class Store:
    """A directory, named by its absolute path or URL. A value, so that it can be sent to other nodes.

    File names are relative to the directory. A name that leaves it raises UserError.
    """

    root: str

    @classmethod
    def at(cls, location: str) -> "Store":
        """Return the store at a local path, s3://… or gs://…; raise UserError for an empty path or another URL."""
        if not location:
            raise UserError("the path is empty; give a path, or . for the current directory")
        scheme, separator, address = location.partition("://")
        if not separator:
            return cls(_absolute(location))
        if scheme == "file":
            return cls(_absolute(re.sub(r"^localhost(?=/)", "", address)))
        bucket = "/".join(part for part in address.split("/") if part)  # clients refuse a//b
        if "@" in bucket:
            raise UserError(f"{scheme}://…: a URL must not contain credentials; set them in the environment")
        if scheme not in SCHEMES or not bucket:
            supported = ", ".join(f"{name}://BUCKET/…" for name in SCHEMES)
            raise UserError(f"{location}: unsupported URL; give a local path, {supported}")
        if {".", ".."} & set(bucket.split("/")):
            raise UserError(f"{location}: an object store has no . and .. in paths; write the path without them")
        return cls(f"{scheme}://{bucket}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    @property
    def parent(self) -> "Store":
        """The directory that contains this one; for a bucket the bucket itself."""
        scheme, separator, path = self.root.rpartition("://")
        folder = os.path.dirname(path)
        return Store(f"{scheme}{separator}{folder}") if folder else self

    @property
    def name(self) -> str:
        return os.path.basename(self.root)

    def below(self, name: str) -> "Store":
        """Return the store of a folder in this one."""
        return Store(f"{self.root}/{_require_inside(self.root, name)}")

    @property
    def _files(self) -> Files:
        return files_at(self.root.rpartition("://")[0])

    @property
    def _folder(self) -> str:
        return self.root.rpartition("://")[2]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{_require_inside(self.root, name)}"

    def _writable_path(self, name: str) -> str:
        """Return `_path` of a file that will be written or removed; OutputError if one of its folders is a link."""
        folder = os.path.dirname(name)
        if folder and self.is_link(folder):
            raise OutputError(f"{self.root}/{folder}: files are not written or removed through a link; remove the link")
        return self._path(name)

    def is_link(self, name: str) -> bool:
        """Whether `name` or one of its folders is a link. The directory itself may be one."""
        parts = PurePosixPath(_require_inside(self.root, name)).parts
        prefixes = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return self.is_local and any(os.path.islink(f"{self._folder}/{prefix}") for prefix in prefixes)

    @property
    def is_there(self) -> bool:
        """Whether the directory exists. A directory of an object store exists if it contains an object."""
        return self._files.is_folder(self._folder)

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        return self._files.size(self._path(name)) is not None

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; FileNotFoundError if it does not exist."""
        size = self._files.size(self._path(name))
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.root}/{name}")
        return size

    def entries(self) -> dict[str, bool]:
        """Return name -> is a file, for everything directly in the directory; empty if it does not exist."""
        return self._files.children(self._folder)

    def names(self) -> list[str]:
        """Return the sorted names of the files directly in the directory."""
        return sorted(name for name, is_file in self.entries().items() if is_file)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytearray:
        """Return the bytes [start, start + length) of a file; without `length` all from `start` on.

        Raises:
            StoreError: the file ends before, or the store returned too few bytes.
        """
        length = self.size(name) - start if length is None else length
        data = self._files.read(self._path(name), start, length)
        if len(data) != length:
            raise StoreError(
                f"{self.root}/{name}: expected {length} bytes at {start}, got {len(data)}; the file is truncated, or"
                " the read was incomplete"
            )
        return data

    def stream(self, name: str, start: int, length: int) -> Iterator[bytearray]:
        """Yield the bytes [start, start + length) of a file in pieces of CHUNK."""
        for offset in range(start, start + length, CHUNK):
            yield self.read(name, offset, min(CHUNK, start + length - offset))

    def write(self, name: str, pieces: Iterable[BytesLike]) -> FileRecord:
        """Write a file from pieces and verify it. A reader sees it complete and durable, or not at all.

        Raises:
            StoreError: the stored file differs from what was written.
        """
        digest, etag_digest, size = hashlib.sha256(), EtagDigest(), 0

        def hashed() -> Iterator[BytesLike]:
            nonlocal size
            for piece in pieces:
                digest.update(piece)
                if not self.is_local:
                    etag_digest.update(piece)
                size += memoryview(piece).nbytes
                yield piece

        self._files.write(self._writable_path(name), hashed())
        if (stored_size := self._files.size(self._path(name))) != size:
            self.remove(name)
            raise StoreError(
                f"{self.root}/{name}: {stored_size} bytes are stored after {size} were written; check the disk"
            )
        if not self._files.content_proved(self._path(name), etag_digest) and self.sha256(name) != digest.hexdigest():
            self.remove(name)
            raise StoreError(
                f"{self.root}/{name}: the stored bytes differ from those written; check the disk or the connection"
            )
        return FileRecord(name, size, digest.hexdigest())

    def put(self, name: str, data: bytes) -> None:
        """Write a small file without verifying it, because another run may replace it at the same moment."""
        self._files.write(self._writable_path(name), [data])

    def create(self, name: str, data: bytes) -> bool:
        """`put` the file unless it exists; returns whether it was written. An object store always writes it."""
        return self._files.create(self._writable_path(name), data)

    def locked(self) -> AbstractContextManager[None]:
        """Lock the directory against other processes on this disk. Has no effect where the store has no locks."""
        return self._files.locked(self._folder)

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write `value` as JSON with sorted keys, so that equal values give equal bytes."""
        return self.write(name, [json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"])

    def read_json(self, name: str, limit: int = JSON_LIMIT) -> Any:
        """Return the value of a JSON file; ValueError if it is not JSON, or has more than `limit` bytes."""
        if (size := self.size(name)) > limit:
            raise ValueError(f"{size:,} bytes, the limit is {limit:,}")
        text = bytes(self.read(name)).decode()
        try:
            value = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if _SURROGATE_ESCAPE.search(text):
            _require_no_lone_surrogates(value)
        return value

    def sha256(self, name: str) -> str:
        """Return the sha256 of a file, in hexadecimal."""
        digest = hashlib.sha256()
        for piece in self.stream(name, 0, self.size(name)):
            digest.update(piece)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with its contents, if it exists. Targets of links stay."""
        self._files.remove(self._writable_path(name))

    def remove_empty(self) -> None:
        """Remove the directory if it is empty."""
        self._files.remove_empty(self._folder)

    def free_bytes(self) -> int | None:
        """Return the free bytes of the disk on which the directory is or would be created.

        None if there is no limit.
        """
        return self._files.free_bytes(self._folder)


def require_free_space(store: Store, nbytes: int) -> None:
    """Raise OutputError if the store's disk has fewer than `nbytes` free bytes."""
    free = store.free_bytes()
    if free is not None and nbytes > free:
        raise OutputError(
            f"{store.root}: {nbytes:,} bytes are needed, {free:,} are free on its disk; free some, or choose another"
            " disk"
        )


def _require_no_lone_surrogates(value: Any) -> None:
    """Raise ValueError for a string with an unpaired surrogate, which could not be written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string contains lone surrogates") from None


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its directory; links are not followed."""
    pure = PurePosixPath(name)
    return bool(pure.parts) and not (pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name)


def _require_inside(root: str, name: str) -> str:
    """Return `name`; raise UserError if it leaves the directory."""
    if not is_inside(name):
        raise UserError(f"{root}: file name {name!r} points outside the directory; repair the index")
    return name


def _absolute(path: str) -> str:
    """Return an absolute path. `..` after a link is the parent of the link's target, as for the operating system."""
    parts = path.split("/")
    if ".." not in parts:
        return os.path.abspath(path)
    end = len(parts) - parts[::-1].index("..")
    return os.path.abspath(os.path.join(os.path.realpath("/".join(parts[:end])), *parts[end:]))
