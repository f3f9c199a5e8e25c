"""Check and measure everything that is claimed of a GPU; a table on standard output, JSON where asked for.

    python -m benchmarks.gpu [--json FILE] [--device cpu]

One GPU, under eight minutes. Exit code 1: a claim does not hold. 2: there is no GPU; `--device cpu` then runs the same calls in
small, which checks this script and nothing of a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import print_markdown
from benchmarks.gpu import arithmetic, compression, models
from benchmarks.gpu.finding import Bench, Finding
from pipeline.device import device_name, fix_arithmetic

_SECONDS = 440.0  # after which no further part is begun
PARTS: tuple[Callable[[Bench], Iterator[Finding]], ...] = (
    arithmetic.tf32, arithmetic.errors, compression.twice_and_parity, models.models, compression.blocks,
    arithmetic.products, arithmetic.factorisations, compression.whole_matrices,
)  # fmt: skip


def run(bench: Bench) -> list[Finding]:
    """All parts, one after the other; one that fails is a finding like another."""
    found, started = [], time.monotonic()
    for part in PARTS:
        if time.monotonic() - started > _SECONDS:
            found.append(Finding(part.__name__, "not begun: out of time", ok=False))
            continue
        try:
            found += part(bench)
        except Exception as error:
            found.append(Finding(part.__name__, f"{type(error).__name__}: {error}".splitlines()[0], ok=False))
    return [*found, Finding("all of it", time.monotonic() - started, "s")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--json", metavar="FILE", help="also write the findings there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu runs the same calls in small on this machine", file=sys.stderr)
        return 2
    bench = Bench(arguments.device, arguments.device == "cpu")
    fix_arithmetic(bench.device)
    found = run(bench)
    about = {"device": device_name(bench.device), "torch": torch.__version__, "cuda": torch.version.cuda}
    words = {True: "holds", False: "FAILS", None: ""}
    print(f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}\n")
    print_markdown(["what", "found", "unit", "claim"], [(f.what, f.value, f.unit, words[f.ok]) for f in found])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**about, "findings": [asdict(one) for one in found]}, indent=1))
    return int(any(one.ok is False for one in found))


if __name__ == "__main__":
    sys.exit(main())
