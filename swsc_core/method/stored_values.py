"""Centroids and factors as they are stored: in a floating point dtype, or in few bits.

The paper stores them in 16 bits and names fewer as future work (section VI, "combined with orthogonal methods"). Fewer are
round-to-nearest codes, symmetric, in groups of 64 values in row-major order that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.method.rtn import RtnMatrix, dequantize, group_count, quantize
from swsc_core.storage.packing import packed_bytes

GROUP = 64  # values that share a scale: at 8 bits a scale adds 3% to them


@dataclass(frozen=True)
class StoredValues:
    """A matrix of values [a, b] as stored.

    Attributes:
        data: the values in the storage dtype, or packed uint8 codes.
        scales: of the groups, in the storage dtype; None when `data` holds the values themselves.
        bits: width of a code; None when `data` holds the values themselves.
    """

    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None
    bits: int | None = None

    def expand(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values in `dtype`, [a, b]."""
        if self.scales is None or self.bits is None:
            return self.data.to(dtype)
        count = self.shape[0] * self.shape[1]
        codes = RtnMatrix(
            (1, count), self.bits, min(GROUP, count), True, self.data, self.scales, self.data.new_empty(0)
        )
        return dequantize(codes, dtype).reshape(self.shape)


def store_values(values: Tensor, bits: int | None, dtype: torch.dtype) -> StoredValues:
    """`values` [a, b] in `dtype`, or in codes of `bits` bits with scales in `dtype` (bfloat16 in place of fp8)."""
    shape = (values.shape[0], values.shape[1])
    if bits is None or not values.numel():
        return StoredValues(shape, values.to(dtype))
    flat, scales = values.reshape(1, -1), scale_dtype(dtype)
    codes = quantize(flat, bits, granularity="group", group_size=GROUP, symmetric=True, scale_dtype=scales)
    return StoredValues(shape, codes.codes, codes.scales, bits)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scales are stored in beside values of `dtype`: never fp8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def store_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive `scales` as they are stored; those that underflow become the smallest normal value."""
    stored = scales.to(scale_dtype(dtype))
    return stored.clamp(min=torch.finfo(stored.dtype).tiny)


def value_bytes(shape: tuple[int, int], bits: int | None, dtype_bits: int) -> int:
    """Bytes that `store_values` stores."""
    count = shape[0] * shape[1]
    if bits is None or not count:
        return count * dtype_bits // 8
    return packed_bytes(count, bits) + group_count((1, count), min(GROUP, count)) * max(dtype_bits, 16) // 8
