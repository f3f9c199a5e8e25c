"""Round-to-nearest quantization, the paper's baseline (section IV-A): per tensor, per output channel or per group.

A group of weights shares one scale and, unless symmetric, one zero point: w ≈ scale · (code − zero_point). The grid
is that of GPTQ's published code: asymmetric ranges always include zero; a symmetric range is the asymmetric one of
[−max|w|, max|w|] with the zero point fixed at 2^(bits−1). Codes are computed with the scale as it is stored.
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
        codes: uint8 [packed_bytes(m * n, bits)], row-major codes of `bits` bits.
        scales: [groups] in the storage dtype.
        zero_points: uint8 [packed_bytes(groups, bits)]; empty if symmetric.
        group_size: weights that share a scale: m * n, n, or as given. The last group of a row may be shorter.
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
    """Number of groups; a group never crosses from one row into the next, unless it is the whole tensor."""
    return 1 if length == shape[0] * shape[1] else shape[0] * -(-shape[1] // length)


def quantize(
    weight: Tensor,
    bits: int,
    *,
    granularity: Granularity = "channel",
    group_size: int = 128,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> RtnMatrix:
    """Quantize a floating point matrix [m, n] to `bits` (2 to 8) bits by rounding to nearest.

    Scales are stored in `scale_dtype`; by default in the weight's own, or in bfloat16 for an fp8 weight.

    Raises:
        ValueError: not a finite matrix, bits or group_size out of range.
    """
    require_matrix(name, weight)
    require_range(name, "bits", bits, 2, 8)
    require_range(name, "group_size", group_size, 1, max(group_size, 1))
    shape = (weight.shape[0], weight.shape[1])
    length = group_length(shape, granularity, group_size)
    groups = _grouped(weight.float(), length)
    top = 2**bits - 1
    low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    dtype = scale_dtype or (torch.bfloat16 if weight.element_size() == 1 else weight.dtype)
    steps = torch.full_like(high, top)  # a number of the host: CUDA would multiply by its reciprocal, off by a last bit
    scales = ((high - low) / steps).to(dtype)
    used = scales.float()
    used = torch.where(used > 0, used, 1.0)  # an all-zero group, or one whose scale underflows, becomes zero
    middle = torch.full_like(low, 2 ** (bits - 1))
    zeros = middle if symmetric else (-low / used).round().clamp(0, top)
    codes = (groups / used[:, None]).round_().add_(zeros[:, None]).clamp_(0, top)
    codes = _ungrouped(codes, shape, length).reshape(-1).to(torch.uint8)
    packed_zeros = pack(zeros.to(torch.uint8), 0 if symmetric else bits)
    return RtnMatrix(shape, bits, length, symmetric, pack(codes, bits), scales, packed_zeros)


def dequantize(matrix: RtnMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense [m, n] matrix that `matrix` stands for, computed in float32 and rounded to `dtype`."""
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
    """[groups, length] copy of the matrix; a short last group of a row is filled up with the row's last value."""
    m, n = weight.shape
    if length == m * n:
        return weight.reshape(1, -1).clone()
    fill = weight[:, -1:].expand(m, -n % length)
    return torch.cat([weight, fill], dim=1).reshape(-1, length)


def _ungrouped(groups: Tensor, shape: tuple[int, int], length: int) -> Tensor:
    m, n = shape
    return groups.reshape(m, -1)[:, :n] if length != m * n else groups.reshape(m, n)
