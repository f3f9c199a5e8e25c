"""Checks the header of a GGUF file against the size of the file, before a reader that trusts every count parses it.

A count of 2**40 in a file of sixty bytes makes llama.cpp's package allocate until memory is exhausted. Here every
string, array and tensor must be inside the file, and sizes of the model (its layers, its experts) must be possible for
the file's tensors.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.architectures.config_bounds import require_buildable

_VERSIONS = (2, 3)
# Type of a scalar -> its format character of `struct`.
_SCALARS = dict(zip((*range(8), *range(10, 13)), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Bits of a value in the smallest tensor type.
_MIN_BITS = 1
# Limits of a header. Vocabularies of 262,144 tokens have 1.3 million array elements.
_MAX_KEYS, _MAX_TENSORS, _MAX_ELEMENTS = 10_000, 1 << 20, 1 << 22
_MAX_DIMENSIONS, _MAX_NAME_BYTES = 8, 1 << 16


@dataclass
class _Reader:
    """Parses values at a position of a file. Reading past the end raises ValueError.

    Attributes:
        order: byte order, as `struct` denotes it.
        elements: array elements that were read so far.
    """

    data: mmap.mmap
    order: str = "<"
    position: int = 0
    elements: int = 0

    def number(self, kind: str) -> int | float:
        """Read a number with a format character of `struct`."""
        size = struct.calcsize(kind)
        self.skip(size)
        value: int | float = struct.unpack_from(self.order + kind, self.data, self.position - size)[0]
        return value

    def count(self, unit: str, limit: int, kind: str = "Q") -> int:
        """Read a count; ValueError if it exceeds the limit."""
        value = int(self.number(kind))
        if value > limit:
            raise ValueError(f"{value:,} {unit}, the limit is {limit:,}")
        return value

    def skip(self, nbytes: int) -> None:
        """Advance by a number of bytes."""
        if nbytes > len(self.data) - self.position:
            raise ValueError(f"the header needs {nbytes:,} bytes at {self.position:,}, the file has {len(self.data):,}")
        self.position += nbytes

    def name(self) -> str:
        """Read a string."""
        length = self.count("bytes of a name", _MAX_NAME_BYTES)
        self.skip(length)
        return self.data[self.position - length : self.position].decode(errors="replace")

    def value(self, kind: int) -> int | float | None:
        """Read a scalar, or skip a string or an array and return None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            self.skip(int(self.number("Q")))
        elif kind == _ARRAY:
            self._skip_array()
        else:
            raise ValueError(f"a value of the unknown type {kind}")
        return None

    def _skip_array(self) -> None:
        kind, count = int(self.number("I")), int(self.number("Q"))
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise ValueError(f"arrays of {self.elements:,} elements, the limit is {_MAX_ELEMENTS:,}")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(int(self.number("Q")))
        else:
            raise ValueError(f"an array of values of type {kind}; arrays hold numbers or strings")


def require_bounded_header(file: Path) -> None:
    """Check the header of a GGUF file.

    Raises:
        ValueError: the header is impossible for a file of this size.
        CheckpointError: a size of the model exceeds its bound.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, position=4)
        version = int(reader.number("I"))
        if version & 0xFFFF == 0:  # written with the other byte order
            reader.order, reader.position = ">", 4
            version = int(reader.number("I"))
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of the format, only 2 and 3 are supported; convert the model again")
        tensors, keys = reader.count("tensors", _MAX_TENSORS), reader.count("keys", _MAX_KEYS)
        values = {reader.name(): reader.value(int(reader.number("I"))) for _ in range(keys)}
        for _ in range(tensors):
            _require_tensor_inside(reader)
    _require_enough_tensors(values, tensors)
    require_buildable(str(file), values)


def _require_tensor_inside(reader: _Reader) -> None:
    """Read the description of a tensor; ValueError if its data would be outside the file."""
    name = reader.name()
    dimensions = reader.count("dimensions of a tensor", _MAX_DIMENSIONS, "I")
    values = math.prod(int(reader.number("Q")) for _ in range(dimensions))
    reader.skip(4)  # the type
    offset = int(reader.number("Q"))
    if offset + values * _MIN_BITS // 8 > len(reader.data):
        raise ValueError(f"{name} has {values:,} values at {offset:,}, the file has {len(reader.data):,} bytes")


def _require_enough_tensors(values: Mapping[str, int | float | None], tensors: int) -> None:
    """Raise ValueError if the model has more layers than the file has tensors."""
    for key, value in values.items():
        if key.endswith(".block_count") and value is not None and value > tensors:
            raise ValueError(f"{key} is {value:,}, but the file has only {tensors:,} tensors")
