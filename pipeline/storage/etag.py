"""Checksums that an object store gives for free: an ETag is usually computed from MD5 digests of the object.

The ETag of an object that was uploaded in one request is the MD5 of its bytes. The ETag of a multipart upload is the
MD5 of the MD5 digests of its parts, followed by the number of parts. An object that the store encrypts with a key of
its own (SSE-KMS) has another ETag. So a match proves that the bytes are right, and a mismatch proves nothing.
"""

import hashlib
import re
from collections.abc import Iterable

# Bytes of a part in uploads of pyarrow.
PART_BYTES = 10 << 20
# Part sizes of other clients, in MiB: their defaults, and what they choose for large objects.
_PART_MIB = (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class EtagDigest:
    """Computes the ETags of an object incrementally: as a single upload, and in parts of `part` bytes."""

    def __init__(self, part: int = PART_BYTES) -> None:
        self._part, self._in_part = part, 0
        self._whole, self._current = _md5(), _md5()
        self._finished: list[bytes] = []

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        """Add the next bytes."""
        view = memoryview(piece).cast("B")
        self._whole.update(view)
        while view:
            if self._in_part == self._part:
                self._finished.append(self._current.digest())
                self._current, self._in_part = _md5(), 0
            part_bytes = view[: self._part - self._in_part]
            self._current.update(part_bytes)
            self._in_part += len(part_bytes)
            view = view[len(part_bytes) :]

    @property
    def etags(self) -> tuple[str, str]:
        """The ETag of the bytes so far as a single upload, and as a multipart upload."""
        parts = [*self._finished, self._current.digest()]
        return self._whole.hexdigest(), f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def etag_matches(etag: str, data: bytes | bytearray) -> bool:
    """Whether `etag` proves `data`. False also if the ETag was computed in an unknown way."""
    if (match := _ETAG.fullmatch(etag)) is None:
        return False
    parts = int(match[2] or 0)
    return any(_etag_of(data, part) == etag.strip('"') for part in _part_sizes(len(data), parts))


def _part_sizes(size: int, parts: int) -> Iterable[int]:
    """Yield the part sizes that an upload of `size` bytes in `parts` parts may have had; 0 for a single upload."""
    if parts < 2:
        return (0,) if not parts else (max(1, size),)
    return (mib << 20 for mib in _PART_MIB if -(-size // (mib << 20)) == parts)


def _etag_of(data: bytes | bytearray, part: int) -> str:
    digest = EtagDigest(part or PART_BYTES)
    digest.update(data)
    return digest.etags[bool(part)]


def _md5(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
