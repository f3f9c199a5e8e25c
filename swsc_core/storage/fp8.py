"""Weights of eight bits and their scales, made bfloat16: how checkpoints are read that were trained or stored so."""

import torch
from torch import Tensor


def dequantize_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """`weight` [m, n] times its scales, as bfloat16 [m, n]; calculated in float32, some rows at a time.

    Args:
        weight: of any floating point dtype.
        scales: float [ceil(m / block[0]), ceil(n / block[1])], one for each block; the last blocks may be cut off.
        block: rows and columns of a block.
    """
    rows, columns = block
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    for place, own in enumerate(scales.float()):
        part = slice(place * rows, (place + 1) * rows)
        out[part] = weight[part].float() * own.repeat_interleave(columns)[: weight.shape[1]]
    return out
