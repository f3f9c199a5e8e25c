"""Round-to-nearest quantization, the paper's baseline (section IV-A): per tensor, per output channel or per group.

The weights of a group share one scale and, unless symmetric, one zero point: w ≈ scale · (code − zero_point). The grid
is that of GPTQ's published code: an asymmetric range always includes zero; a symmetric range is the asymmetric range
[−max|w|, max|w|] with the zero point 2^(bits−1). Codes are computed with the scale as it is stored.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swsc_core.checks import require_matrix, require_range
from swsc_core.storage.packing import pack, unpack

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class RtnMatrix:
    """A quantized m×n matrix.

    Attributes:
        shape: (m, n).
        bits: width of a code.
        group_size: weights that share a scale: m * n, n, or as given. The last group of a row may be shorter.
        symmetric: all groups have the zero point 2^(bits−1), which is not stored.
        codes: uint8 [packed_bytes(m * n, bits)], row-major codes of `bits` bits.
        scales: [groups] in the storage dtype.
        zero_points: uint8 [packed_bytes(groups, bits)]; empty if symmetric.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    codes: Tensor
    scales: Tensor
    zero_points: Tensor


def group_length(shape: tuple[int, int], granularity: Granularity, group_size: int) -> int:
    """Number of consecutive weights that share a scale."""
    if granularity == "tensor":
        return shape[0] * shape[1]
    return shape[1] if granularity == "channel" else min(group_size, shape[1])


def group_count(shape: tuple[int, int], length: int) -> int:
    """Number of groups of `length` weights; unless it is the whole tensor, a group is part of one row."""
    return 1 if length == shape[0] * shape[1] else shape[0] * -(-shape[1] // length)


def quantize(
    weight: Tensor,
    bits: int,
    *,
    granularity: Granularity = "channel",
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> RtnMatrix:
    """Quantize a matrix by rounding to nearest.

    Args:
        weight: floating point [m, n]; not changed.
        bits: width of a code, 2 to 8.
        granularity: what shares a scale: the whole tensor, an output channel, or `group_size` weights of one.
        group_size: weights per group, for granularity "group".
        symmetric: fix the zero point in the middle of the grid.
        scale_dtype: dtype of stored scales; by default that of the weight, or bfloat16 for an fp8 weight.

    Raises:
        ValueError: not a finite matrix, bits or group_size out of range.
    """
    require_quantizable("quantize", weight, bits, group_size)
    length = group_length((weight.shape[0], weight.shape[1]), granularity, group_size)
    return quantize_groups(weight, bits, length, symmetric, scale_dtype)


def require_quantizable(name: str, weight: Tensor, bits: int, group_size: int) -> None:
    """Raise ValueError, naming the tensor, unless the arguments are valid for `quantize`."""
    require_matrix(name, weight)
    require_range(name, "bits", bits, 2, 8)
    if group_size < 1:
        raise ValueError(f"{name}: group_size {group_size} is out of range; choose 1 or more")


def quantize_groups(
    weight: Tensor, bits: int, length: int, symmetric: bool, scale_dtype: torch.dtype | None
) -> RtnMatrix:
    """`quantize` with a scale for every `length` weights (`group_length`); the arguments are not checked."""
    shape = (weight.shape[0], weight.shape[1])
    groups = _grouped(weight.float(), length)
    scales, zeros = _grid(groups, bits, symmetric, scale_dtype or _default_scale_dtype(weight))
    codes = (groups / _divisors(scales)[:, None]).round_().add_(zeros[:, None]).clamp_(0, 2**bits - 1)
    codes = _ungrouped(codes, shape, length).reshape(-1).to(torch.uint8)
    packed_zeros = pack(zeros.to(torch.uint8), 0 if symmetric else bits)
    return RtnMatrix(shape, bits, length, symmetric, pack(codes, bits), scales, packed_zeros)


def _default_scale_dtype(weight: Tensor) -> torch.dtype:
    return torch.bfloat16 if weight.element_size() == 1 else weight.dtype


def _grid(groups: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales [groups] in `dtype`, and float32 zero points [groups], of the grids of groups [groups, length]."""
    low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # A tensor, not a number: CUDA multiplies by the reciprocal of a number, which changes the last bit.
    steps = torch.full_like(high, 2**bits - 1)
    scales = ((high - low) / steps).to(dtype)
    if symmetric:
        return scales, torch.full_like(low, 2 ** (bits - 1))
    return scales, (-low / _divisors(scales)).round().clamp(0, 2**bits - 1)


def _divisors(scales: Tensor) -> Tensor:
    """Scales in float32; 1 for a group of zeros, or one whose scale underflows, which is restored as zeros."""
    divisors = scales.float()
    return torch.where(divisors > 0, divisors, 1.0)


def dequantize(matrix: RtnMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [m, n] of stored codes, computed in float32 and rounded to `dtype`."""
    m, n = matrix.shape
    codes = unpack(matrix.codes, matrix.bits, m * n).float().reshape(m, n)
    count = group_count(matrix.shape, matrix.group_size)
    if matrix.symmetric:
        zeros = torch.full((count,), float(2 ** (matrix.bits - 1)), device=codes.device)
    else:
        zeros = unpack(matrix.zero_points, matrix.bits, count).float()
    groups = _grouped(codes, matrix.group_size)
    groups = groups.sub_(zeros[:, None]).mul_(matrix.scales.float()[:, None])
    return _ungrouped(groups, matrix.shape, matrix.group_size).to(dtype)


def _grouped(weight: Tensor, length: int) -> Tensor:
    """Copy of the matrix as [groups, length]; a short last group of a row is padded with the row's last value."""
    m, n = weight.shape
    if length == m * n:
        return weight.reshape(1, -1).clone()
    fill = weight[:, -1:].expand(m, -n % length)
    return torch.cat([weight, fill], dim=1).reshape(-1, length)


def _ungrouped(groups: Tensor, shape: tuple[int, int], length: int) -> Tensor:
    """Inverse of `_grouped`: [m, n] without the padding."""
    m, n = shape
    return groups.reshape(m, -1)[:, :n] if length != m * n else groups.reshape(m, n)
