"""The header of a GGUF file held against the file's own size, before a reader that believes every count goes through it.

A count of 2**40 in a file of sixty bytes keeps llama.cpp's own package busy until memory ends. Here every string, array and tensor must lie
within the file, and what a model would be built by (its layers, its experts) must be of a number that the file's tensors can have.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from pipeline.architectures.config_bounds import require_buildable

_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type -> struct's
_STRING, _ARRAY = 8, 9
_LEAST_BITS = 1  # of a value of a tensor, over all types that there are
_KEYS, _TENSORS, _ELEMENTS = 10_000, 1 << 20, 1 << 22  # vocabularies of 262,144 tokens have 1.3 million elements in all
_DIMENSIONS, _LONGEST = 8, 1 << 16  # of a tensor; bytes of a name


@dataclass
class _Reader:
    """A place in the bytes of a file; reading beyond their end raises ValueError."""

    data: mmap.mmap
    order: str = "<"
    at: int = 0
    elements: int = 0

    def number(self, kind: str) -> int | float:
        size = struct.calcsize(kind)
        self.skip(size)
        value: int | float = struct.unpack_from(self.order + kind, self.data, self.at - size)[0]
        return value

    def count(self, what: str, most: int, kind: str = "Q") -> int:
        value = int(self.number(kind))
        if value > most:
            raise ValueError(f"{value:,} {what}, at most {most:,} are read")
        return value

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.at:
            raise ValueError(f"its header wants {nbytes:,} bytes at {self.at:,}, and it has {len(self.data):,}")
        self.at += nbytes

    def name(self) -> str:
        length = self.count("bytes of a name", _LONGEST)
        self.skip(length)
        return self.data[self.at - length : self.at].decode(errors="replace")

    def value(self, kind: int) -> int | float | None:
        """A scalar; None for a string or an array, which is gone through."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            self.skip(int(self.number("Q")))
        elif kind == _ARRAY:
            self._array()
        else:
            raise ValueError(f"a value of the unknown type {kind}")
        return None

    def _array(self) -> None:
        kind, count = int(self.number("I")), int(self.number("Q"))
        self.elements += count
        if self.elements > _ELEMENTS:
            raise ValueError(f"arrays of {self.elements:,} elements, at most {_ELEMENTS:,} are read")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(int(self.number("Q")))
        else:
            raise ValueError(f"an array of values of type {kind}: arrays hold numbers or strings")


def require_bounded_header(file: Path) -> None:
    """Raise ValueError for a header that cannot be that of the file, CheckpointError for numbers that no model is built by."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, at=4)
        version = int(reader.number("I"))
        if version & 0xFFFF == 0:  # of a machine of the other byte order
            reader.order, reader.at = ">", 4
            version = int(reader.number("I"))
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of the format, of which 2 and 3 are read; convert the model again")
        tensors, keys = reader.count("tensors", _TENSORS), reader.count("keys", _KEYS)
        found = {reader.name(): reader.value(int(reader.number("I"))) for _ in range(keys)}
        for _ in range(tensors):
            _require_tensor(reader)
    _require_layers(found, tensors)
    require_buildable(str(file), found)


def _require_tensor(reader: _Reader) -> None:
    name = reader.name()
    dimensions = reader.count("dimensions of a tensor", _DIMENSIONS, "I")
    values = math.prod(int(reader.number("Q")) for _ in range(dimensions))
    reader.skip(4)  # its type
    offset = int(reader.number("Q"))
    if offset + values * _LEAST_BITS // 8 > len(reader.data):
        raise ValueError(f"{name} has {values:,} values at {offset:,}, and the file {len(reader.data):,} bytes")


def _require_layers(found: dict[str, int | float | None], tensors: int) -> None:
    """Raise ValueError if there are more layers than tensors."""
    for key, value in found.items():
        if key.endswith(".block_count") and value is not None and value > tensors:
            raise ValueError(f"{key} says {value:,} layers of {tensors:,} tensors")
