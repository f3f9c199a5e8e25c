"""Claim: the search for nearest centroids, most of the time of a compression by segments, beats products and `argmin`.

Segments and codebooks as `--preset best` chooses them; median of alternated runs, one thread, equal labels.
"""

import argparse
import statistics
import sys

import torch
from torch import Tensor

from benchmarks.common import print_markdown, timed
from swsc_core.method.weighted_kmeans import nearest

_CASES = ((1, 32), (2, 64), (2, 1024), (3, 1024), (4, 256), (4, 1024), (8, 16), (8, 256))  # segment size, centroids
_POINTS, _RUNS = 1 << 16, 9
_BLOCK_VALUES = 1 << 21


def by_argmin(points: Tensor, centroids: Tensor) -> Tensor:
    """The plain way: ‖c‖² − 2 x·c a block of points at a time, and `argmin` over the centroids."""
    norms, block = centroids.square().sum(dim=1), _BLOCK_VALUES // len(centroids)
    return torch.cat([torch.addmm(norms, part, centroids.T, alpha=-2).argmin(dim=1) for part in points.split(block)])


def compare(size: int, k: int) -> tuple[str, int, float, float, float]:
    """A row of the table; labels may differ where two distances are equal but for rounding."""
    generator = torch.Generator().manual_seed(0)
    points, centroids = (torch.randn(count, size, generator=generator) for count in (_POINTS, k))
    ways = [lambda: nearest(points, centroids), lambda: by_argmin(points, centroids)]
    differing = int((ways[0]() != ways[1]()).sum())
    assert differing <= _POINTS // 1000, f"{differing} labels differ"
    seconds: list[list[float]] = [[], []]
    for _ in range(_RUNS):
        for way, times in zip(ways, seconds, strict=True):
            times.append(timed(way)[1])
    ours, plain = (statistics.median(times) * 1e9 / (_POINTS * k) for times in seconds)
    return f"{size}", k, ours, plain, plain / ours


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [compare(size, k) for size, k in _CASES]
    print_markdown(("segment size", "centroids", "ns a distance", "by argmin", "ratio"), rows)
    return 0 if all(row[-1] > 1 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
