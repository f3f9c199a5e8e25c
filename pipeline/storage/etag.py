"""Checksums that an object store gives for free: the ETag of an object is, mostly, made of MD5 digests of its content.

That of an object that was put in one piece is the MD5 of its bytes; that of a multipart upload is the MD5 of the MD5s of its
parts, and says their number. An object that the store encrypts by a key of its own (SSE-KMS) has an ETag that is neither: a
match proves that the bytes are right, no match proves nothing.
"""

import hashlib
import re
from collections.abc import Iterable

PART_BYTES = 10 << 20  # bytes of a part in what pyarrow uploads
# Parts of other clients, in MiB: their defaults, and what they choose for large objects.
_KNOWN_PARTS = (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class EtagDigest:
    """The ETags that bytes may have: as one object, and in parts of `part` bytes; fed piece by piece."""

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
            taken = view[: self._part - self._in_part]
            self._current.update(taken)
            self._in_part += len(taken)
            view = view[len(taken) :]

    @property
    def etags(self) -> tuple[str, str]:
        """ETag of one object with the bytes so far, and of one uploaded in parts."""
        parts = [*self._finished, self._current.digest()]
        return self._whole.hexdigest(), f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def etag_matches(etag: str, data: bytes | bytearray) -> bool:
    """Whether `etag` is one of exactly these bytes; False if it may be, but was made in a way that is not known."""
    if (found := _ETAG.fullmatch(etag)) is None:
        return False
    number = int(found[2] or 0)
    return any(_of(data, part) == etag.strip('"') for part in _part_sizes(len(data), number))


def _part_sizes(size: int, number: int) -> Iterable[int]:
    """Sizes that `number` parts of an object may have; 0: it was put in one piece."""
    if number < 2:
        return (0,) if not number else (max(1, size),)
    return (mib << 20 for mib in _KNOWN_PARTS if -(-size // (mib << 20)) == number)


def _of(data: bytes | bytearray, part: int) -> str:
    digest = EtagDigest(part or PART_BYTES)
    digest.update(data)
    return digest.etags[bool(part)]


def _md5(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
