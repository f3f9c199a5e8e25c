"""HQQ (half-quadratic quantization): no calibration; its optimiser is on.

Groups lie along rows (axis=1), which fast kernels want, or along columns (axis=0), which its documentation calls better.

Counted: codes at their width, one scale and one zero point a group in 16 bits each, as `HQQLinear` keeps them. At 3 bits
the tool puts ten codes into an int32; the two idle bits are not counted, in its favour. Groups may run over the end of a row,
so any group size that divides the matrix will do.
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
        weights[name], groups = one(weight, request.bits, group, request.axis)
        stored[name] = packed_bytes(weight.numel(), request.bits) + 2 * groups * SCALE_BYTES
    settings = {"bits": request.bits, "group": group or "channel", "axis": request.axis, "optimize": True}
    return Outcome("HQQ", version("hqq"), settings, weights, stored)


def one(weight: Tensor, bits: int, group: int | None, axis: int) -> tuple[Tensor, int]:
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
