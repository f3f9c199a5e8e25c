"""optimum-quanto: weights only, so no calibration; qint2 or qint4, as it knows no width between them.

3 bits are answered with 4, and the row says so. A group size that does not divide the rows is lowered by 32s until it does,
which is the tool's own rule (576 columns: 128 becomes 96). Of its two optimisers the HQQ one is taken, as it has the lower
error. Counted: codes at their width, a scale and a shift a group in 16 bits each; the packed bytes are checked against it.
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
        raise Refusal(f"{request.bits} bits: quanto's narrow weights have 2 or 4")
    kind = KINDS[request.bits]
    weights, stored, used = {}, {}, set()
    for name, weight in tensors(request.model, shapes):
        group = None if request.group_size == CHANNEL else dividing(weight.shape[1], request.group_size)
        weights[name], groups = one(weight, kind, group)
        stored[name] = packed_bytes(weight.numel(), kind.bits) + 2 * groups * SCALE_BYTES
        used.add(group or "channel")
    settings = {"bits": kind.bits, "group": ", ".join(map(str, sorted(used))), "optimizer": "HqqOptimizer"}
    return Outcome("quanto", version("optimum-quanto"), settings, weights, stored)


def dividing(columns: int, group: int) -> int:
    """The largest group size, by steps of 32, that divides a row."""
    for size in range(group, 31, -32):
        if columns % size == 0:
            return size
    raise Refusal(f"no group size from {group} down to 32 divides {columns} columns")


def one(weight: Tensor, kind: qtype, group: int | None) -> tuple[Tensor, int]:
    """The restored matrix and its number of groups; float16, whose scales lose less than bfloat16's."""
    half = weight.half()
    scale, shift = HqqOptimizer()(half, qtype=kind, axis=0, group_size=group)
    packed = quantize_weight(half, qtype=kind, axis=0, scale=scale, shift=shift, group_size=group)
    assert scale.dtype == shift.dtype == torch.float16, "counted as 16 bits"
    return packed.dequantize(), scale.numel()


if __name__ == "__main__":
    one(torch.eye(32), qint2, None)  # the first use of all compiles an extension, which is no cost of quantizing
    raise SystemExit(run(arguments(__doc__), quantize))
