"""Experiment: what does it cost to fix one thread a worker, and what would more threads cost in bytes?

One 4096×4096 matrix, k=384, r=192 (the paper's 3 bits), in fresh processes: one process with one thread, one with two,
and two at once with one thread each, which is how a node with two workers runs. Every process makes the same weight, by
one thread, and hashes what it stores: results that depend on the number of threads must not be mixed in one output.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.common import print_markdown, structured_weight, timed

WAYS = {"1 process × 1 thread": (1, 1), "1 process × 2 threads": (1, 2), "2 processes × 1 thread": (2, 1)}


def child(threads: int, side: int, clusters: int, rank: int) -> dict[str, Any]:
    """Encode one matrix; seconds of it and sha256 of what is stored."""
    import torch

    from swsc_core import SwscSpec, encode

    torch.set_num_threads(1)  # the input must not depend on what is measured
    weight = structured_weight(side, side, seed=2).bfloat16()
    torch.set_num_threads(threads)
    encode(weight[:256, :256].contiguous(), [SwscSpec(16, 8)])  # first calls of the libraries cost more
    encoded, seconds = timed(lambda: encode(weight, [SwscSpec(clusters, rank)]))
    digest = hashlib.sha256()
    for name, tensor in sorted(encoded.tensors.items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    kept = {key: encoded.stats[key] for key in ("kmeans_seconds", "svd_seconds")}
    return {"seconds": seconds, **kept, "sha256": digest.hexdigest(), "error": encoded.relative_error}


def run(processes: int, threads: int, size: Sequence[str]) -> dict[str, Any]:
    """Run children at once; seconds a matrix, and what the children found."""
    command = [sys.executable, "-m", "benchmarks.threads", *size, "--child", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    results = [json.loads(process.communicate()[0]) for process in started]
    slowest = max(results, key=lambda result: result["seconds"])
    return {**slowest, "seconds": slowest["seconds"] / processes, "sha256": {result["sha256"] for result in results}}


def names(digests: Iterable[str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(digests))


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
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(given.runs):
        for way, (processes, threads) in WAYS.items():
            found[way].append(run(processes, threads, size))
            last = found[way][-1]
            print(f"run {number}, {way}: {last['seconds']:.2f} s a matrix, {names(last['sha256'])}", file=sys.stderr)
    base = found["1 process × 1 thread"]
    rows = []
    for way, results in found.items():
        ratio = median(a["seconds"] / b["seconds"] for a, b in zip(results, base, strict=True))
        seconds = [median(result[key] for result in results) for key in ("seconds", "kmeans_seconds", "svd_seconds")]
        seconds.insert(0, min(result["seconds"] for result in results))
        hashes = names(set.union(*(result["sha256"] for result in results)))
        rows.append((way, *(f"{value:.2f}" for value in seconds), f"{ratio:.2f}", hashes, f"{results[0]['error']:.6f}"))
    times = ("least s a matrix", "median", "K-Means", "SVD", "ratio to 1 × 1")
    print_markdown(("way", *times, "sha256 of what is stored", "error"), rows)
    print(f"\nMedian of {given.runs} runs, {given.side}×{given.side}, k={given.clusters}, r={given.rank}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
