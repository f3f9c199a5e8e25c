"""Dequantization of checkpoints that store weights in eight bits with a scale per block."""

import torch
from torch import Tensor


def dequantize_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """`weight` times its scales, bfloat16 [m, n]; computed in float32, one row of blocks at a time.

    Args:
        weight: [m, n] of any floating point dtype.
        scales: floating point [ceil(m / block[0]), ceil(n / block[1])], one per block; the last blocks may be
            incomplete.
        block: rows and columns of a block.
    """
    rows, columns = block
    dequantized = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    for index, block_scales in enumerate(scales.float()):
        part = slice(index * rows, (index + 1) * rows)
        dequantized[part] = weight[part].float() * block_scales.repeat_interleave(columns)[: weight.shape[1]]
    return dequantized
