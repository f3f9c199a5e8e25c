"""Bounded decompression of gzip, zstd, xz and bzip2 files."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import first_line

# Suffix of a compressed file -> its format.
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
_OPENERS: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}


class Damaged(ValueError):
    """A compressed file is unreadable, or larger than allowed once decompressed."""


def compression_of(data: bytes | bytearray) -> str | None:
    """The format that the first bytes indicate; None for uncompressed data."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def decompressed(data: bytes | bytearray, kind: str, max_bytes: int) -> bytearray:
    """Decompress `data`.

    Args:
        kind: a value of COMPRESSED.
        max_bytes: limit of the decompressed size.

    Raises:
        Damaged: the data is truncated, damaged, of another format, or larger than the limit.
    """
    if compression_of(data) != kind:
        raise Damaged(f"named as {kind}, but its content is not; rename it or compress it again")
    try:
        content = bytearray(_opened(data, kind).read(max_bytes + 1))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise Damaged(f"damaged {kind} ({first_line(error)}); download or compress it again") from None
    if len(content) > max_bytes:
        raise Damaged(f"more than {max_bytes:,} bytes once decompressed; give a part of it")
    return content


def _opened(data: bytes | bytearray, kind: str) -> IO[bytes] | pa.CompressedInputStream:
    if kind == "zstd":
        return pa.CompressedInputStream(pa.BufferReader(bytes(data)), "zstd")
    file: IO[bytes] = _OPENERS[kind](io.BytesIO(data))
    return file
