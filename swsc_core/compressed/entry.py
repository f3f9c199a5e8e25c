"""Entries of config.json about compressed matrices: one frozen dataclass per method, checked on construction.

An entry and the stored tensors that it describes determine the dense weight. docs/format.md specifies the JSON form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import torch

from swsc_core.method.rtn import Granularity, group_count, group_length
from swsc_core.method.segmentation import Layout
from swsc_core.method.spec import SwscSpec
from swsc_core.method.stored_values import GROUP
from swsc_core.storage.bits import ChannelAxis, label_bits
from swsc_core.storage.json_fields import (
    FLAG,
    JsonValue,
    integer,
    integers,
    json_field,
    one_of,
    read_fields,
    written_fields,
)
from swsc_core.storage.location import MatrixLocation
from swsc_core.storage.packing import packed_bytes

_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_VALUE_BITS = one_of(None, 4, 6, 8)
_POSITIVE = "a positive number"


class PartShape(NamedTuple):
    """Shape of a stored tensor, and whether it holds floating point values or else packed uint8."""

    shape: tuple[int, ...]
    is_float: bool


@dataclass(frozen=True)
class Entry:
    """Base class of all entries; a method adds fields by `json_field`.

    Attributes:
        shape: [outputs, inputs] of the matrix.
        dtype: torch's name of the dtype of a restored matrix.
        location: of the matrix in a dense checkpoint.

    Raises:
        ValueError: contradictory values.
    """

    method: ClassVar[str]
    shape: tuple[int, int] = json_field(integers(2, 1), "two positive numbers")
    dtype: str = json_field(one_of(*_DTYPES), f"one of {', '.join(_DTYPES)}")
    location: MatrixLocation = field(default=MatrixLocation(), kw_only=True)

    def __post_init__(self) -> None:
        self.location.require_rows(self.shape[0])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a restored matrix."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def low_rank(self) -> int:
        """Rank of the stored low-rank part; 0 for a method without one."""
        return 0

    @property
    def n_labels(self) -> int:
        """Number of stored labels; 0 for a method without any."""
        return 0

    def part_shapes(self) -> dict[str, PartShape]:
        """Stored tensors of the matrix: part name ("weight", "labels", …) -> shape and kind."""
        raise NotImplementedError

    def require_growing_rank(self, added: int) -> None:
        """Raise ValueError unless the rank of the low-rank part can grow by `added`."""
        raise ValueError(f"a matrix of method {self.method} has no low-rank part")

    def with_low_rank(self, rank: int) -> Self:
        """The entry of the same matrix with a low-rank part of rank `rank`."""
        raise NotImplementedError

    def to_json(self) -> dict[str, JsonValue]:
        """The JSON object of config.json."""
        return {"method": self.method, **written_fields(self), **self.location.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, object], version: int | None = None) -> Self:
        """Inverse of `to_json`; unknown keys are ignored.

        Args:
            data: the JSON object.
            version: format version of `data`; None for the current one.

        Raises:
            ValueError: a value is missing, of the wrong type, or contradicts others; the message names the key.
        """
        values = read_fields(cls, cls._upgraded(data) if version == 1 else data)
        return cls(**values, location=MatrixLocation.from_json(data))

    @staticmethod
    def _upgraded(data: Mapping[str, object]) -> Mapping[str, object]:
        """An entry of version 1 with the keys of the current version."""
        return data


@dataclass(frozen=True)
class SwscEntry(Entry):
    """Entry of method "swsc", a matrix that was compressed by an `SwscSpec`.

    Attributes:
        n_clusters: centroids per codebook.
        rank: of the low-rank part.
        channel_axis: channels are rows ("output") or columns ("input") of the matrix.
        segment_size: weights per segment; the length of a channel in the paper's form.
        codebooks: groups of rows with a codebook each.
        scaled: a scale per row is stored.
        centroid_bits, factor_bits: width of stored values; None for floating point values.
    """

    method: ClassVar[str] = "swsc"
    n_clusters: int = json_field(integer(0), "a number")
    rank: int = json_field(integer(0), "a number")
    channel_axis: ChannelAxis = json_field(one_of("output", "input"), "output or input")
    segment_size: int = json_field(integer(1), _POSITIVE)
    codebooks: int = json_field(integer(1), _POSITIVE)
    scaled: bool = json_field(FLAG, "true or false")
    centroid_bits: int | None = json_field(_VALUE_BITS, "null, 4, 6 or 8")
    factor_bits: int | None = json_field(_VALUE_BITS, "null, 4, 6 or 8")

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = SwscSpec(self.n_clusters, self.rank, self.channel_axis, None, self.segment_size, self.codebooks)
        spec.require_shape(f"a matrix of {self.shape[0]}×{self.shape[1]}", self.shape)

    @property
    def layout(self) -> Layout:
        """Segmentation of the matrix."""
        return Layout(*self.shape, self.channel_axis, self.segment_size)

    @property
    def low_rank(self) -> int:
        return self.rank

    @property
    def n_labels(self) -> int:
        return self.layout.count if self.n_clusters else 0

    def part_shapes(self) -> dict[str, PartShape]:
        (m, n), layout = self.shape, self.layout
        labels = packed_bytes(layout.count, label_bits(self.n_clusters))
        parts = {"labels": PartShape((labels,), False)}
        if self.scaled:
            parts["scales"] = PartShape((m,), True)
        parts |= _value_shapes("weight", (self.codebooks * self.n_clusters, layout.size), self.centroid_bits)
        parts |= _value_shapes("left", (self.rank, m), self.factor_bits)
        return parts | _value_shapes("right", (self.rank, n), self.factor_bits)

    @staticmethod
    def _upgraded(data: Mapping[str, object]) -> Mapping[str, object]:
        """Version 1 had only whole channels and floating point values."""
        shape = data.get("shape")
        if not isinstance(shape, list) or len(shape) != 2:
            # `read_fields` refuses the shape.
            return data
        length = shape[1 if data.get("channel_axis") == "output" else 0]
        added = {"segment_size": length, "codebooks": 1, "scaled": False, "centroid_bits": None, "factor_bits": None}
        return {**added, **data}

    def require_growing_rank(self, added: int) -> None:
        if self.factor_bits is not None:
            raise ValueError(f"its low-rank part is stored in {self.factor_bits} bits a value")
        rank, largest = self.rank + added, min(self.shape)
        if rank > largest:
            raise ValueError(f"its low-rank part would have rank {rank}, the largest useful rank is {largest}")

    def with_low_rank(self, rank: int) -> "SwscEntry":
        return replace(self, rank=rank)


def _value_shapes(part: str, shape: tuple[int, int], bits: int | None) -> dict[str, PartShape]:
    if bits is None:
        return {part: PartShape(shape, True)}
    count = shape[0] * shape[1]
    groups = group_count((1, count), min(GROUP, count))
    return {part: PartShape((packed_bytes(count, bits),), False), f"{part}_scales": PartShape((groups,), True)}


@dataclass(frozen=True)
class RtnEntry(Entry):
    """Entry of method "rtn", a matrix that was quantized by rounding to nearest.

    Attributes:
        bits: width of a code.
        granularity: what shares a scale: the whole tensor, an output channel, or a group of weights.
        symmetric: no zero points are stored.
        group_size: weights per group, for granularity "group"; else None.
    """

    method: ClassVar[str] = "rtn"
    bits: int = json_field(one_of(*range(2, 9)), "2 to 8")
    granularity: Granularity = json_field(one_of("tensor", "channel", "group"), "tensor, channel or group")
    symmetric: bool = json_field(FLAG, "true or false")
    group_size: int | None = json_field(integer(1), _POSITIVE, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("group_size is missing, which granularity group needs")

    @property
    def group_length(self) -> int:
        """Consecutive weights that share a scale."""
        return group_length(self.shape, self.granularity, self.group_size or 0)

    def part_shapes(self) -> dict[str, PartShape]:
        groups = group_count(self.shape, self.group_length)
        codes = packed_bytes(self.shape[0] * self.shape[1], self.bits)
        zeros = 0 if self.symmetric else packed_bytes(groups, self.bits)
        return {
            "weight": PartShape((codes,), False),
            "scales": PartShape((groups,), True),
            "zero_points": PartShape((zeros,), False),
        }
