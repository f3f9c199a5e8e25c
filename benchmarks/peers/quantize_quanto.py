"""optimum-quanto: weights only, without calibration, as qint2 or qint4.

A request for 3 bits uses 4 bits, and the row is labelled accordingly. A group size that does not divide a row is
lowered in steps of 32, the tool's own rule (96 instead of 128 for 576 columns). The HQQ optimiser is used, which has
the lower error of its two. Bits count codes at their width, and a scale and a shift of 16 bits each per group.
"""

import argparse
from importlib.metadata import version

import torch
from optimum.quanto import HqqOptimizer, qint2, qint4, qtype, quantize_weight
from torch import Tensor

from benchmarks.peers.script import CHANNEL, SCALE_BYTES, Outcome, Refusal, Shapes, arguments, run, tensors
from swsc_core.storage.packing import packed_bytes

KINDS = {2: qint2, 3: qint4, 4: qint4}


def quantize(request: argparse.Namespace, shapes: Shapes) -> Outcome:
    if request.bits not in KINDS:
        raise Refusal(f"{request.bits} bits: quanto supports 2 and 4 bits")
    kind = KINDS[request.bits]
    weights, stored, used = {}, {}, set()
    for name, weight in tensors(request.model, shapes):
        group = None if request.group_size == CHANNEL else dividing(weight.shape[1], request.group_size)
        weights[name], groups = quantize_matrix(weight, kind, group)
        stored[name] = packed_bytes(weight.numel(), kind.bits) + 2 * groups * SCALE_BYTES
        used.add(group or "channel")
    settings = {"bits": kind.bits, "group": ", ".join(map(str, sorted(used))), "optimizer": "HqqOptimizer"}
    return Outcome("quanto", version("optimum-quanto"), settings, weights, stored)


def dividing(columns: int, group: int) -> int:
    """The largest group size, in steps of 32, that divides a row."""
    for size in range(group, 31, -32):
        if columns % size == 0:
            return size
    raise Refusal(f"no group size from {group} down to 32 divides {columns} columns")


def quantize_matrix(weight: Tensor, kind: qtype, group: int | None) -> tuple[Tensor, int]:
    """The restored matrix and its number of groups, in float16, whose scales are more precise than bfloat16."""
    half = weight.half()
    scale, shift = HqqOptimizer()(half, qtype=kind, axis=0, group_size=group)
    packed = quantize_weight(half, qtype=kind, axis=0, scale=scale, shift=shift, group_size=group)
    assert scale.dtype == shift.dtype == torch.float16, "counted as 16 bits"
    return packed.dequantize(), scale.numel()


if __name__ == "__main__":
    quantize_matrix(torch.eye(32), qint2, None)  # the first call compiles an extension, which is not measured
    raise SystemExit(run(arguments(__doc__), quantize))
