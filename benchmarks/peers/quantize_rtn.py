"""Round to nearest of this project (swsc_core/method/rtn.py), asymmetric, with one scale per matrix, row or group.

Bits count codes and zero points, packed without gaps at their width, and scales of 16 bits.
"""

import argparse

import torch

from benchmarks.peers.script import CHANNEL, WHOLE_TENSOR, Outcome, Shapes, arguments, run, tensors
from swsc_core.method.rtn import Granularity, RtnMatrix, dequantize
from swsc_core.method.rtn import quantize as round_to_nearest

GRANULARITIES: dict[int, Granularity] = {WHOLE_TENSOR: "tensor", CHANNEL: "channel"}


def quantize(request: argparse.Namespace, shapes: Shapes) -> Outcome:
    granularity = GRANULARITIES.get(request.group_size, "group")
    weights, stored = {}, {}
    for name, weight in tensors(request.model, shapes):
        matrix = round_to_nearest(
            weight,
            request.bits,
            granularity=granularity,
            group_size=max(1, request.group_size),
            scale_dtype=weight.dtype if weight.element_size() == 2 else torch.float16,
        )
        weights[name], stored[name] = dequantize(matrix), stored_bytes(matrix)
    settings = {"bits": request.bits, "group": granularity if request.group_size < 1 else request.group_size}
    return Outcome("RTN", "ours", {**settings, "symmetric": False}, weights, stored)


def stored_bytes(matrix: RtnMatrix) -> int:
    return sum(part.numel() * part.element_size() for part in (matrix.codes, matrix.scales, matrix.zero_points))


if __name__ == "__main__":
    raise SystemExit(run(arguments(__doc__), quantize))
