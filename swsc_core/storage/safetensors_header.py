"""Headers of safetensors files: parsing, with checks before any weight is read, and writing.

A file is eight bytes (the header's length, little-endian), a JSON object `{name: {dtype, shape, data_offsets}}`, and
the tensors' bytes without gaps. The safetensors library is not used for this, because tensors are read by byte range
from stores that the library does not support, and because a hostile header must be refused before anything is
allocated.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from swsc_core.storage.json_fields import JsonValue

PREFIX_BYTES = 8
# Largest header that is read, in bytes; larger than any real header.
HEADER_LIMIT = 16_000_000
# Name of a dtype in the format -> (torch's name, bytes per value).
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "C64": ("complex64", 8),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}
# Bits per value of every dtype of the format. torch packs or lacks the narrow ones.
BITS = {name: 8 * width for name, (_, width) in DTYPES.items()} | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file.

    Attributes:
        dtype: the format's name of the dtype; a later version of the format may have one that is not in `BITS`.
        start: offset of its bytes from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the header, from the first eight bytes of a file.

    Raises:
        ValueError: a file of `file_bytes` bytes cannot have a header of this length.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or not 2 <= length <= min(file_bytes - PREFIX_BYTES, HEADER_LIMIT):
        raise ValueError(f"truncated or not a safetensors file ({file_bytes} bytes)")
    return length


def parse_header(raw: bytes, file_bytes: int) -> list[HeaderEntry]:
    """The tensors that the header `raw` of a file of `file_bytes` bytes describes, in order of their bytes.

    Raises:
        ValueError: `raw` is no header, a tensor's shape does not fit its bytes, or the tensors do not fill the file.
    """
    try:
        content = json.loads(raw, object_pairs_hook=_without_duplicates)
        content.pop("__metadata__", None)
        entries = [_entry(name, fields, PREFIX_BYTES + len(raw)) for name, fields in content.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"corrupt header ({error})") from None
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    position = PREFIX_BYTES + len(raw)
    for entry in entries:
        if entry.start != position:
            raise ValueError(f"corrupt header: {entry.name} overlaps or leaves a gap")
        position += entry.nbytes
    if position != file_bytes:
        raise ValueError(f"{file_bytes} bytes, expected {position}: truncated or corrupt")
    return entries


def read_header(read: Callable[[int, int], bytes], file_bytes: int) -> tuple[bytes, list[HeaderEntry]]:
    """Header bytes and tensors of a file of `file_bytes` bytes.

    Args:
        read: `read(start, count)` returns a range of bytes of the file.

    Raises:
        ValueError: the conditions of `header_length` and `parse_header`.
    """
    raw = read(PREFIX_BYTES, header_length(read(0, min(PREFIX_BYTES, file_bytes)), file_bytes))
    return raw, parse_header(raw, file_bytes)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """First bytes of a file of the given tensors (name, dtype, shape, nbytes), one after the other in this order."""
    entries: dict[str, JsonValue] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The data must start at a multiple of eight.
    raw += b" " * (-len(raw) % PREFIX_BYTES)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate name")
    return result


def _entry(name: str, fields: dict[str, Any], data_start: int) -> HeaderEntry:
    dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    is_whole = all(type(value) is int and value >= 0 for value in (*shape, start, stop))
    bits = BITS.get(dtype)
    # The width of a dtype of a later version is unknown. Readers refuse such a tensor if they need its values.
    fits = is_whole and isinstance(dtype, str) and (bits is None or 8 * (stop - start) == math.prod(shape) * bits)
    if not fits or start > stop:
        raise ValueError(f"{name}: shape {list(shape)} does not fit bytes {start} to {stop}")
    return HeaderEntry(name, dtype, shape, data_start + start, stop - start)
