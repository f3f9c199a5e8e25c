"""Experiment: the cost of one thread per worker, and whether more threads change the bytes.

    python -m benchmarks.threads

Compresses one 4096×4096 matrix with k = 384 and r = 192 (the paper's 3 bits) in fresh processes: one process with one
thread, one process with two threads, and two processes at once with one thread each, as on a node with two workers. All
processes generate the same weight with one thread, and hash what they store. If the hashes differ between numbers of
threads, workers with different numbers of threads must not write one output.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TypedDict

from benchmarks.common import print_markdown, structured_weight, timed

# Name -> number of processes, threads of each.
LAYOUTS = {"1 process × 1 thread": (1, 1), "1 process × 2 threads": (1, 2), "2 processes × 1 thread": (2, 1)}


class Result(TypedDict):
    """Seconds of one matrix, sha256 of the stored bytes, and relative error."""

    seconds: float
    kmeans_seconds: float
    svd_seconds: float
    sha256: list[str]
    error: float


def child(threads: int, side: int, clusters: int, rank: int) -> Result:
    """Compress one matrix in this process."""
    import torch

    from swsc_core import SwscSpec, encode

    torch.set_num_threads(1)  # the weight must not depend on `threads`
    weight = structured_weight(side, side, seed=2).bfloat16()
    torch.set_num_threads(threads)
    encode(weight[:256, :256].contiguous(), [SwscSpec(16, 8)])  # the first calls of libraries are slower
    encoded, seconds = timed(lambda: encode(weight, [SwscSpec(clusters, rank)]))
    digest = hashlib.sha256()
    for name, tensor in sorted(encoded.tensors.items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return {
        "seconds": seconds,
        "kmeans_seconds": encoded.stats["kmeans_seconds"],
        "svd_seconds": encoded.stats["svd_seconds"],
        "sha256": [digest.hexdigest()],
        "error": encoded.relative_error,
    }


def run(processes: int, threads: int, size: Sequence[str]) -> Result:
    """Run processes at once. Seconds per matrix are those of the slowest process, divided by their number."""
    command = [sys.executable, "-m", "benchmarks.threads", *size, "--child", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    results: list[Result] = [json.loads(process.communicate()[0]) for process in started]
    slowest = max(results, key=lambda result: result["seconds"])
    digests = sorted({digest for result in results for digest in result["sha256"]})
    return {**slowest, "seconds": slowest["seconds"] / processes, "sha256": digests}


def shortened(digests: Iterable[str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(digests))


def row_of(layout: str, runs: Sequence[Result], base: Sequence[Result]) -> tuple[str, ...]:
    """A row of the table; `base` are the runs that times are divided by."""
    ratio = median(a["seconds"] / b["seconds"] for a, b in zip(runs, base, strict=True))
    seconds = [
        min(run["seconds"] for run in runs),
        median(run["seconds"] for run in runs),
        median(run["kmeans_seconds"] for run in runs),
        median(run["svd_seconds"] for run in runs),
    ]
    digests = shortened({digest for run in runs for digest in run["sha256"]})
    return layout, *(f"{value:.2f}" for value in seconds), f"{ratio:.2f}", digests, f"{runs[0]['error']:.6f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--clusters", type=int, default=384)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.side, given.clusters, given.rank)))
        return 0
    size = [f"--{key}={getattr(given, key)}" for key in ("side", "clusters", "rank")]
    results: dict[str, list[Result]] = {layout: [] for layout in LAYOUTS}
    for number in range(given.runs):
        for layout, (processes, threads) in LAYOUTS.items():
            last = run(processes, threads, size)
            results[layout].append(last)
            print(f"run {number}, {layout}: {last['seconds']:.2f} s, {shortened(last['sha256'])}", file=sys.stderr)
    rows = [row_of(layout, runs, results["1 process × 1 thread"]) for layout, runs in results.items()]
    times = ("least s per matrix", "median", "K-Means", "SVD", "ratio to 1 × 1")
    print_markdown(("layout", *times, "sha256 of the stored bytes", "error"), rows)
    print(f"\nMedian of {given.runs} runs, {given.side}×{given.side}, k={given.clusters}, r={given.rank}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
