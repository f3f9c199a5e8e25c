"""HQQ (half-quadratic quantization): without calibration, with its optimiser.

Groups are along rows (axis=1), which fast kernels need, or along columns (axis=0), which its documentation recommends
for quality.

Bits count codes at their width, and one scale and one zero point of 16 bits each per group, as in `HQQLinear`. At 3
bits the tool packs ten codes into an int32; the two unused bits are not counted, in its favour. A group may continue in
the next row, so that any group size that divides the matrix is possible.
"""

import argparse
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor

from benchmarks.peers.script import CHANNEL, SCALE_BYTES, Outcome, Refusal, Shapes, arguments, run, tensors
from swsc_core.storage.packing import packed_bytes


def quantize(request: argparse.Namespace, shapes: Shapes) -> Outcome:
    group = None if request.group_size == CHANNEL else request.group_size
    odd = [name for name, (rows, columns) in shapes.items() if group and rows * columns % group]
    if odd:
        raise Refusal(f"group size {group} does not divide the weights of {odd[0]}")
    weights, stored = {}, {}
    for name, weight in tensors(request.model, shapes):
        weights[name], groups = quantize_matrix(weight, request.bits, group, request.axis)
        stored[name] = packed_bytes(weight.numel(), request.bits) + 2 * groups * SCALE_BYTES
    settings = {"bits": request.bits, "group": group or "channel", "axis": request.axis, "optimize": True}
    return Outcome("HQQ", version("hqq"), settings, weights, stored)


def quantize_matrix(weight: Tensor, bits: int, group: int | None, axis: int) -> tuple[Tensor, int]:
    """The restored matrix and its number of groups."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    scales = [layer.meta[part] for part in ("scale", "zero")]
    assert all(part.dtype == torch.float16 for part in scales), "counted as 16 bits"
    return layer.dequantize(), scales[0].numel()


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--axis", type=int, choices=(0, 1), default=1)
    raise SystemExit(run(parser, quantize))
