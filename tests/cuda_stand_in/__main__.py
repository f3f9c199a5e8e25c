"""Launches and waits of a block of columns, as the stand-in counts them: `python -m tests.cuda_stand_in`."""

from dataclasses import replace

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
        sharing = CodebookFit(weight(64, n), metric(64, n), spec, torch.bfloat16)
        sharing.start(torch.Generator().manual_seed(0))
        blocks = n // sharing.layout.width
        for name, step in (("assign", lambda s=sharing: s.assign(feedback=True)), ("reassign", sharing.reassign)):
            with device.counted() as counts:
                step()
            launches, waits = counts.at("_feed_slab", "_descend_slab", "_assign", "nearest")
            found.append((axis, name, launches / blocks, waits / blocks, sum(counts.waits.values())))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    with StandIn() as device:
        print_markdown(["axis", "step", "launches a block", "waits a block", "waits of the step"], rows())
