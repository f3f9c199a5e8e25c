"""Centroids and factors as they are stored: in a floating point dtype, or in few bits.

The paper stores 16-bit values and leaves the combination with other compression methods to future work (section V).
Values of few bits are symmetric round-to-nearest codes in groups of 64 values, in row-major order, that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.method.rtn import RtnMatrix, dequantize, group_count, quantize
from swsc_core.storage.packing import packed_bytes

# Values that share a scale. With codes of 8 bits the scales add 3% to the bytes.
GROUP = 64


@dataclass(frozen=True)
class StoredValues:
    """A matrix of values [a, b] as stored.

    Attributes:
        shape: (a, b).
        data: the values [a, b] in the storage dtype, or packed uint8 codes.
        scales: of the groups, in the storage dtype; None if `data` holds the values themselves.
        bits: width of a code; None if `data` holds the values themselves.
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
    """Store `values` [a, b] in `dtype`, or as codes of `bits` bits with scales in `scale_dtype(dtype)`."""
    shape = (values.shape[0], values.shape[1])
    if bits is None or not values.numel():
        return StoredValues(shape, values.to(dtype))
    row, scales = values.reshape(1, -1), scale_dtype(dtype)
    codes = quantize(row, bits, granularity="group", group_size=GROUP, symmetric=True, scale_dtype=scales)
    return StoredValues(shape, codes.codes, codes.scales, bits)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which scales are stored beside values of `dtype`: `dtype` itself, but bfloat16 in place of fp8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def store_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive `scales` as stored beside values of `dtype`; underflow is clamped to the smallest normal value."""
    stored = scales.to(scale_dtype(dtype))
    return stored.clamp(min=torch.finfo(stored.dtype).tiny)


def value_bytes(shape: tuple[int, int], bits: int | None, dtype_bits: int) -> int:
    """Bytes that `store_values` stores for values of `shape`, if the storage dtype has `dtype_bits` bits."""
    count = shape[0] * shape[1]
    if bits is None or not count:
        return count * dtype_bits // 8
    return packed_bytes(count, bits) + group_count((1, count), min(GROUP, count)) * max(dtype_bits, 16) // 8
