"""Claim: the inertia of our K-Means is at most 1.01 × that of scikit-learn's KMeans(n_init=10).

    python -m benchmarks.kmeans [--model DIR]

Measured on the Q and K matrices of a checkpoint, at the cluster counts of the paper's 3- and 2-bit budgets and along
both axes; on random matrices; and on clustered points with fewer, as many and more clusters than there are. Both sides
get the same float32 points, number of threads and seeds. Inertia is computed here in float64 from the labels alone. The
runs differ in their seed, and the side that runs first alternates.

Good result, exit code 0: no case is above 1.01 with any seed. The table also gives the ratio of times.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.common import print_markdown, timed
from pipeline.architectures.families import Family
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import read_matrix
from pipeline.models.matrices import matrices_of
from swsc_core import kmeans
from swsc_core.allocation.budget import solve_budget
from swsc_core.storage.bits import ChannelAxis, Geometry

# Inertia, ours over scikit-learn's.
LIMIT = 1.01
AXES: tuple[ChannelAxis, ...] = ("output", "input")
# number of clusters, dimensions, standard deviation of their centres (that of their points is 1), least and most points
CLUSTERED = ((40, 16, 1, 50, 50), (40, 16, 3, 50, 50), (40, 16, 10, 50, 50), (50, 3, 10, 2, 40), (200, 8, 8, 10, 10))


@dataclass(frozen=True)
class Case:
    """Points [n, d] to be clustered into k."""

    name: str
    points: Tensor
    k: int


def real_cases(location: str, layers: set[str]) -> Iterator[Case]:
    """Channels of the Q and K matrices of some layers, with k for each budget and axis."""
    checkpoint = open_checkpoint(location)
    family = Family(checkpoint.config)
    tensors = checkpoint.tensors.values()
    matrices = [matrix for info in tensors for matrix in matrices_of(checkpoint, family, info)]
    for matrix in matrices:
        name = matrix.name
        if matrix.role not in ("q", "k") or layers.isdisjoint(re.findall(r"\d+", name)):
            continue
        weight = read_matrix(checkpoint.store, matrix).float()
        for axis in AXES:
            points = weight if axis == "output" else weight.T.contiguous()
            for bits in (3, 2):
                k, _ = solve_budget(Geometry(weight.shape[0], weight.shape[1], axis), bits, count="paper")
                layer = re.findall(r"\d+", name)[0]
                yield Case(f"real: layer {layer} {matrix.role}, {axis}, {bits} bits", points, k)


def random_cases() -> Iterator[Case]:
    """Gaussian points; the last cases have many points per cluster and use the GEMM path of the core."""
    for n, d, k in ((576, 576, 54), (1024, 256, 96), (2048, 64, 128), (4096, 32, 16), (10_000, 16, 64)):
        yield Case("random", torch.randn(n, d, generator=torch.Generator().manual_seed(n)), k)


def clustered_cases() -> Iterator[Case]:
    """Gaussian blobs of equal or unequal size, from overlapping to well separated, with various k.

    Points in few dimensions do not resemble channels, but they have many local optima, which expose a bad
    initialisation.
    """
    for blobs, d, distance, least, most in CLUSTERED:
        generator = torch.Generator().manual_seed(blobs)
        centres = distance * torch.randn(blobs, d, generator=generator)
        sizes = torch.randint(least, most + 1, (blobs,), generator=generator)
        points = centres.repeat_interleave(sizes, dim=0)
        points += torch.randn(points.shape, generator=generator)
        for k in (blobs // 4, blobs // 2, blobs - 1, blobs, blobs + 1, 3 * blobs // 2, 3 * blobs):
            sizes_text = f"{least}" if least == most else f"{least} to {most}"
            yield Case(f"{blobs} clusters of {sizes_text}, distance {distance:g}", points, k)


def inertia(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the labels, in float64."""
    exact = points.double()
    sums = torch.zeros(int(labels.max()) + 1, exact.shape[1], dtype=torch.float64).index_add_(0, labels, exact)
    means = sums / torch.bincount(labels).clamp(min=1)[:, None]
    return float((exact - means[labels]).square().sum())


def ours(case: Case, seed: int) -> Tensor:
    return kmeans(case.points, case.k, seed=seed).labels


def theirs(case: Case, seed: int) -> Tensor:
    labels = KMeans(case.k, n_init=10, random_state=seed).fit(case.points.numpy()).labels_
    return torch.from_numpy(labels).long()


def compare(case: Case, seeds: int) -> tuple[float, float, float]:
    """Worst inertia ratio ours/theirs, median of it, and median time ratio theirs/ours, over the seeds."""
    ratios, speeds = [], []
    for seed in range(seeds):
        order = (ours, theirs) if seed % 2 else (theirs, ours)
        results = {side: timed(partial(side, case, seed)) for side in order}
        ratios.append(inertia(case.points, results[ours][0]) / inertia(case.points, results[theirs][0]))
        speeds.append(results[theirs][1] / results[ours][1])
    return max(ratios), median(ratios), median(speeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory (default: no real matrices)")
    parser.add_argument("--layers", default="0,14,29", help="layers of the checkpoint")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides; a worker has one")
    parser.add_argument("--only", default="", help="regular expression of case names")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [*random_cases(), *clustered_cases()]
    cases += real_cases(arguments.model, set(arguments.layers.split(","))) if arguments.model else []
    rows = []
    with threadpool_limits(arguments.threads):
        for case in (case for case in cases if re.search(arguments.only, case.name)):
            worst, middle, speed = compare(case, arguments.seeds)
            shape = "×".join(map(str, case.points.shape))
            mark = "**worse**" if worst > LIMIT else ""
            rows.append((case.name, shape, case.k, f"{worst:.4f}", f"{middle:.4f}", f"{speed:.1f}", mark))
            print(f"{case.name}, k={case.k}: {worst:.4f}", file=sys.stderr)
    print_markdown(("points", "shape", "k", "worst inertia ratio", "median", "times faster", ""), rows)
    bad = [row for row in rows if row[-1]]
    print(
        f"\nWorst inertia ratio: {max(row[3] for row in rows)} over {len(rows)} cases × {arguments.seeds} seeds;",
        end="",
    )
    print(f" {len(bad)} cases above {LIMIT}. Median times faster: {median(float(row[5]) for row in rows):.1f}.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
