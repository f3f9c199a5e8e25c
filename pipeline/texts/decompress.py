"""Compressed files, whole and within bounds: gzip, zstd, xz and bzip2, by the suffix or by the first bytes."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import first_line

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
_OPENERS: dict[str, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}


class Damaged(ValueError):
    """A compressed file that cannot be read, or holds too much."""


def compression_of(data: bytes | bytearray) -> str | None:
    """What the first bytes say."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def decompressed(data: bytes | bytearray, kind: str, most: int) -> bytearray:
    """What is compressed in `data`; Damaged if it breaks off, is of another kind, or holds more than `most` bytes."""
    if compression_of(data) != kind:
        raise Damaged(f"named as {kind}, and is none; rename it or compress it again")
    try:
        found = bytearray(_opened(data, kind).read(most + 1))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise Damaged(f"damaged {kind} ({first_line(error)}); fetch or compress it again") from None
    if len(found) > most:
        raise Damaged(f"more than {most:,} bytes once decompressed; give a part of it")
    return found


def _opened(data: bytes | bytearray, kind: str) -> IO[bytes] | pa.CompressedInputStream:
    if kind == "zstd":
        return pa.CompressedInputStream(pa.BufferReader(bytes(data)), "zstd")
    opened: IO[bytes] = _OPENERS[kind](io.BytesIO(data))
    return opened
