"""Claim: compressing by activations holds at most 6 copies of the matrix in float32 beside its second moment.

Each shape runs in a process of its own: peak resident memory during `encode`, less what the process had when it held the
moment and nothing else.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import print_markdown, timed
from swsc_core import Metric, SwscSpec, encode

_LIMIT = 6.0
_SPEC = SwscSpec(
    256, 0, segment_size=4, scaled=True, metric="activations", feedback=True, rounds=1, centroid_bits=8
)  # rounds repeat what the first one does


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(m: int, n: int, rank: int) -> None:
    """Print the peak in units of the matrix, the moment left out, and seconds."""
    torch.set_num_threads(1)
    encode(torch.randn(64, 64), [SwscSpec(4, 4)])  # libraries allocate on their first call
    inputs = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    moment = torch.mm(inputs.T, inputs)
    del inputs
    before = resident("VmRSS")
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    spec = SwscSpec(**{**_SPEC.__dict__, "rank": rank, "factor_bits": 8 if rank else None})
    metric = Metric(moment)
    del moment
    _, seconds = timed(lambda: encode(weight, [spec], metric=metric))
    print((resident("VmHWM") - before) / (4 * m * n), seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("M", "N", "RANK"), help="of one measurement")
    arguments = parser.parse_args()
    if arguments.shape:
        measure(*arguments.shape)
        return 0
    rows = []
    for m, n, rank in ((4096, 4096, 0), (4096, 4096, 32), (4096, 11008, 0), (2048, 5504, 0)):
        command = [sys.executable, "-m", "benchmarks.memory", "--shape", str(m), str(n), str(rank)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        copies, seconds = map(float, done.stdout.split())
        rows.append((f"{m}×{n}", rank, copies, seconds))
    print_markdown(("shape", "rank", "copies of the matrix beside the moment", "seconds"), rows)
    return 0 if all(copies <= _LIMIT for _, _, copies, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
