"""Launches and waits of a block of columns, as the stand-in counts them: `python -m tests.cuda_stand_in`."""

from dataclasses import replace
from functools import partial

import torch

from benchmarks.common import print_markdown
from swsc_core.method.codebook_fit import CodebookFit
from tests.cuda_stand_in.device import StandIn
from tests.cuda_stand_in.test_core import BEST, metric, weight


def rows(n: int = 128) -> list[tuple[str, str, float, float, int]]:
    """Axis, step, launches and waits a block, waits of the whole step."""
    found = []
    for axis in ("output", "input"):
        spec = replace(BEST, channel_axis=axis)
        target = weight(64, n)
        fit = CodebookFit(target, metric(64, n), spec, torch.bfloat16)
        fit.start(target, torch.Generator().manual_seed(0))
        blocks = n // fit.layout.width
        for name, step in (("assign", partial(fit.assign, feedback=True)), ("reassign", fit.reassign)):
            with device.counted() as counts:
                step(target)
            launches, waits = counts.at("_assign_with_feedback", "_descend", "assign_block", "_nearest", "nearest")
            found.append((axis, name, launches / blocks, waits / blocks, sum(counts.waits.values())))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    with StandIn() as device:
        print_markdown(["axis", "step", "launches a block", "waits a block", "waits of the step"], rows())
