"""Claim: our truncated SVD stays within 0.1% of the Eckart-Young optimum, in a fraction of the time of the full SVD.

    python -m benchmarks.svd

The matrices are those that SWSC factorises: errors of a K-Means with 256 clusters on a 4096×4096 Gaussian matrix, whose
flat spectrum is the hard case, and on a matrix of low rank with similar channels and noise. The optimum is the tail of
the singular values of torch.linalg.svd. torch.svd_lowrank is measured too, with its error. Calls alternate within each
run.

Good result, exit code 0: the worst squared error is at most 1.001 × the optimum.
"""

import argparse
import sys
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import print_markdown, structured_weight, timed
from swsc_core import kmeans, truncated_svd

# Squared error over the optimum.
LIMIT = 1.001


def error_matrix(kind: str, side: int, k: int) -> Tensor:
    """The error of a K-Means on a matrix."""
    if kind == "random":
        weight = 0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(1))
    else:
        weight = structured_weight(side, side, seed=1)
    result = kmeans(weight, k, n_init=1)
    return weight - result.centroids[result.labels]


def squared_error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """‖matrix − left · right‖²_F in float64."""
    return float((matrix.double() - left.double() @ right.double()).square().sum())


def ours(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    result = truncated_svd(matrix, rank)
    return result.left, result.right


def svd_lowrank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(matrix, q=rank + 32, niter=4)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def measure(kind: str, matrix: Tensor, ranks: list[int], runs: int) -> list[tuple[object, ...]]:
    """One row per rank: error ratios to the optimum (worst run) and time ratios to ours (median of runs)."""
    torch.manual_seed(0)  # svd_lowrank uses the global generator
    full_times: list[float] = []
    errors: dict[int, list[tuple[float, float]]] = {rank: [] for rank in ranks}
    times: dict[int, list[tuple[float, float, float]]] = {rank: [] for rank in ranks}
    for run in range(runs):
        (_, values, _), full = timed(lambda: torch.linalg.svd(matrix, full_matrices=False))
        full_times.append(full)
        tails = values.double().square().flip(0).cumsum(0).flip(0)
        for rank in ranks:
            (left, right), mine = timed(partial(ours, matrix, rank))
            (left2, right2), peer = timed(partial(svd_lowrank, matrix, rank))
            optimum = float(tails[rank])
            pair = squared_error(matrix, left, right) / optimum, squared_error(matrix, left2, right2) / optimum
            errors[rank].append(pair)
            times[rank].append((mine, full / mine, peer / mine))
            print(f"{kind} run {run} rank {rank}: {pair[0]:.5f} {mine:.2f} s", file=sys.stderr)
    print(f"{kind}: torch.linalg.svd {median(full_times):.1f} s", file=sys.stderr)
    return [
        (
            *(kind, rank),
            *(f"{max(column):.5f}" for column in zip(*errors[rank], strict=True)),
            *(f"{median(column):.2f}" for column in zip(*times[rank], strict=True)),
        )
        for rank in ranks
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--ranks", default="16,64,128,192,256")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of all methods; a worker has one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    rows: list[tuple[object, ...]] = []
    for kind in ("random", "low rank + noise"):
        rows += measure(kind, error_matrix(kind, arguments.side, arguments.clusters), ranks, arguments.runs)
    header = ("error matrix of", "rank", "ours / optimum", "svd_lowrank / optimum", "ours, s")
    print_markdown((*header, "linalg.svd / ours, time", "svd_lowrank / ours, time"), rows)
    worst = max(str(row[2]) for row in rows)
    print(f"\nWorst error: {worst} × the optimum (limit {LIMIT}), {arguments.threads} threads, {arguments.runs} runs.")
    return 1 if float(worst) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
