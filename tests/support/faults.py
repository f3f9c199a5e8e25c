"""A file system that fails once, at its n-th operation, in one of several ways."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from pipeline.storage.etag import EtagDigest
from pipeline.storage.files import BytesLike, Files

_WRITES = frozenset({"write", "create"})
_CHANGES = _WRITES | {"remove", "remove_empty"}
_ALL = _CHANGES | {"size", "is_folder", "children", "read", "locked", "free_bytes"}
# mode -> operations that it affects; for reads, "late" would equal "fail"
MODES = {"fail": _ALL, "late": _CHANGES, "full": _WRITES, "short": _WRITES | {"read"}, "slow": _ALL}


class FaultyFiles:
    """Forwards operations to `inner` and injects a fault into number `at` of those that the mode can affect.

    Modes:
        "fail": the operation raises OSError and is not done.
        "late": the operation is done and then raises OSError.
        "full": a write raises ENOSPC halfway.
        "short": half of the bytes are read, or written without an error.
        "slow": a pause before the operation.

    Attributes:
        count: operations counted so far.
    """

    def __init__(self, inner: Files, mode: str, at: int) -> None:
        self._inner, self._mode, self._at = inner, mode, at
        self.count = 0

    def _struck(self, operation: str) -> str:
        """Count the operation; the mode if the fault is due now, else ""."""
        if operation not in MODES[self._mode]:
            return ""
        self.count += 1
        if self.count != self._at:
            return ""
        if self._mode == "slow":
            time.sleep(0.05)
        if self._mode == "fail":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._mode

    def _late(self, mode: str) -> None:
        if mode == "late":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def size(self, path: str) -> int | None:
        self._struck("size")
        return self._inner.size(path)

    def is_folder(self, path: str) -> bool:
        self._struck("is_folder")
        return self._inner.is_folder(path)

    def children(self, path: str) -> dict[str, bool]:
        self._struck("children")
        return self._inner.children(path)

    def read(self, path: str, start: int, length: int) -> bytearray:
        mode = self._struck("read")
        data = self._inner.read(path, start, length)
        return data[: len(data) // 2] if mode == "short" else data

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        mode = self._struck("write")
        if mode in ("full", "short"):
            whole = b"".join(bytes(piece) for piece in pieces)
            pieces = self._half(whole, mode)
        self._inner.write(path, pieces)
        self._late(mode)

    def _half(self, whole: bytes, mode: str) -> Iterator[bytes]:
        yield whole[: len(whole) // 2]
        if mode == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
        return self._inner.content_proved(path, digest)

    def create(self, path: str, data: bytes) -> bool:
        mode = self._struck("create")
        done = self._inner.create(path, data[: len(data) // 2] if mode in ("full", "short") else data)
        if mode == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._late(mode)
        return done

    def locked(self, path: str) -> AbstractContextManager[None]:
        self._struck("locked")
        return self._inner.locked(path)

    def remove(self, path: str) -> None:
        mode = self._struck("remove")
        self._inner.remove(path)
        self._late(mode)

    def remove_empty(self, path: str) -> None:
        mode = self._struck("remove_empty")
        self._inner.remove_empty(path)
        self._late(mode)

    def free_bytes(self, path: str) -> int | None:
        self._struck("free_bytes")
        return self._inner.free_bytes(path)
