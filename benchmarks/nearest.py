"""Claim: the nearest-centroid search of the core is faster than products and `argmin`.

    python -m benchmarks.nearest

The search takes most of the time of vector quantization. Segment sizes and codebooks are those of `--preset best`.
Times are medians of alternating runs with one thread; the labels must agree.

Good result, exit code 0: the ratio of times is above 1 in every row.
"""

import argparse
import statistics
import sys

import torch
from torch import Tensor

from benchmarks.common import print_markdown, timed
from swsc_core.method.weighted_kmeans import nearest

# Segment size, number of centroids.
_CASES = ((1, 32), (2, 64), (2, 1024), (3, 1024), (4, 256), (4, 1024), (8, 16), (8, 256))
_POINTS, _RUNS = 1 << 16, 9
_BLOCK_VALUES = 1 << 21


def by_argmin(points: Tensor, centroids: Tensor) -> Tensor:
    """Labels by ‖c‖² − 2 x·c, one block of points at a time, and `argmin` over the centroids."""
    norms, block = centroids.square().sum(dim=1), _BLOCK_VALUES // len(centroids)
    return torch.cat([torch.addmm(norms, part, centroids.T, alpha=-2).argmin(dim=1) for part in points.split(block)])


def compare(size: int, k: int) -> tuple[str, int, float, float, float]:
    """A row of the table. Labels may differ where two distances are equal except for rounding."""
    generator = torch.Generator().manual_seed(0)
    points, centroids = (torch.randn(count, size, generator=generator) for count in (_POINTS, k))
    searches = [lambda: nearest(points, centroids), lambda: by_argmin(points, centroids)]
    differing = int((searches[0]() != searches[1]()).sum())
    assert differing <= _POINTS // 1000, f"{differing} labels differ"
    seconds: list[list[float]] = [[], []]
    for _ in range(_RUNS):
        for search, times in zip(searches, seconds, strict=True):
            times.append(timed(search)[1])
    ours, plain = (statistics.median(times) * 1e9 / (_POINTS * k) for times in seconds)
    return f"{size}", k, ours, plain, plain / ours


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [compare(size, k) for size, k in _CASES]
    print_markdown(("segment size", "centroids", "ns per distance", "by argmin", "ratio"), rows)
    return 0 if all(row[-1] > 1 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
