"""Check all claims about GPUs and measure times and memory; prints a table, and writes JSON with --json.

    python -m benchmarks.gpu [--json FILE] [--device cpu]

Needs one GPU and takes less than eight minutes. `--device cpu` runs the same calls on small matrices, which checks only
this script.

Good result, exit code 0: all claims hold. Exit code 1: a claim does not hold. Exit code 2: there is no GPU.
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

# Seconds after which no further part starts.
_SECONDS = 440.0
PARTS: tuple[Callable[[Bench], Iterator[Finding]], ...] = (
    arithmetic.tf32,
    arithmetic.errors,
    compression.twice_and_parity,
    models.models,
    compression.blocks,
    arithmetic.products,
    arithmetic.factorisations,
    compression.whole_matrices,
)


def run(bench: Bench) -> list[Finding]:
    """Run all parts, one after the other. A part that raises gives a failed finding."""
    findings: list[Finding] = []
    started = time.monotonic()
    for part in PARTS:
        if time.monotonic() - started > _SECONDS:
            findings.append(Finding(part.__name__, "not started: out of time", ok=False))
            continue
        try:
            findings += part(bench)
        except Exception as error:
            findings.append(Finding(part.__name__, f"{type(error).__name__}: {error}".splitlines()[0], ok=False))
    return [*findings, Finding("all parts", time.monotonic() - started, "s")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA device; --device cpu runs the same calls on small matrices on this machine", file=sys.stderr
        )
        return 2
    bench = Bench(arguments.device, arguments.device == "cpu")
    fix_arithmetic(bench.device)
    findings = run(bench)
    about = {"device": device_name(bench.device), "torch": torch.__version__, "cuda": torch.version.cuda}
    words = {True: "holds", False: "FAILS", None: ""}
    print(f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}\n")
    print_markdown(
        ["measurement", "result", "unit", "claim"], [(f.subject, f.value, f.unit, words[f.ok]) for f in findings]
    )
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({**about, "findings": [asdict(finding) for finding in findings]}, indent=1)
        )
    return int(any(finding.ok is False for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
