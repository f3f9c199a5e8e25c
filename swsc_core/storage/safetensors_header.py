"""The header of a safetensors file: parsed and checked before any weight is read, and built.

A file is eight bytes (the header's length, little-endian), a JSON object `{name: {dtype, shape, data_offsets}}`, and the
tensors' bytes without gaps. The safetensors library is not used for this, because tensors are read by byte range from
stores that the library does not know, and because a hostile header must be refused before anything is allocated.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

PREFIX_BYTES = 8
# Bytes of a header that are read at most: more than any real header has.
HEADER_LIMIT = 16_000_000
# Name of a dtype in the format -> (torch's name, bytes of a value)
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "I64": ("int64", 8), "I32": ("int32", 4),
    "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8), "C64": ("complex64", 8),
    "F8_E8M0": ("float8_e8m0fnu", 1), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}  # fmt: skip
# Bits of a value, of every dtype of the format. torch packs or lacks the narrow ones.
BITS = {name: 8 * width for name, (_, width) in DTYPES.items()} | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file.

    Attributes:
        dtype: as the format spells it; may be one that is not in `BITS`, of a later version of the format.
        start: of its bytes, from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the header that the first eight bytes of a file give; ValueError if no file of `file_bytes` has it."""
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
        raise ValueError(f"{file_bytes} bytes, wanted {position}: truncated or corrupt")
    return entries


def read_header(read: Callable[[int, int], bytes], file_bytes: int) -> tuple[bytes, list[HeaderEntry]]:
    """Header bytes and tensors of a file of `file_bytes` bytes, of which `read(start, count)` returns a range.

    Raises:
        ValueError: as `header_length` and `parse_header`.
    """
    raw = read(PREFIX_BYTES, header_length(read(0, min(PREFIX_BYTES, file_bytes)), file_bytes))
    return raw, parse_header(raw, file_bytes)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """First bytes of a file that holds tensors (name, dtype, shape, nbytes) one after the other, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % PREFIX_BYTES)  # the data must start at a multiple of eight
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
    # The width of a dtype of a later version is not known; what it is used for decides whether that matters.
    fits = is_whole and isinstance(dtype, str) and (bits is None or 8 * (stop - start) == math.prod(shape) * bits)
    if not fits or start > stop:
        raise ValueError(f"{name}: shape {list(shape)} does not fit bytes {start} to {stop}")
    return HeaderEntry(name, dtype, shape, data_start + start, stop - start)
