"""First codebooks for short segments: K-Means in which every coordinate of every point has a weight.

`kmeans` (kmeans.py) clusters a few thousand long points with many starts. Here there are millions of short points, of
which a sample is representative, and error feedback and refits move the centroids afterwards. One start on a sample is
enough.
"""

import torch
from torch import Tensor

from swsc_core.method.pairwise import sum_by_label

# Segments that a codebook is learnt from: the larger of a fixed number and a number per centroid.
_SAMPLES, _SAMPLES_PER_CENTROID = 1 << 15, 128
# Points among them from which k-means++ draws its seeds.
_SEED_POINTS, _SEED_POINTS_PER_CENTROID = 1 << 12, 16
_ITERATIONS = 12
# Distances that are computed at a time. On a CPU they are 2 MiB, which stay in the cache.
_BLOCK_VALUES, _GPU_BLOCK_VALUES = 1 << 19, 1 << 24


def sample_size(n_clusters: int) -> int:
    """Number of segments that a codebook is learnt from."""
    return max(_SAMPLES, _SAMPLES_PER_CENTROID * n_clusters)


def weighted_kmeans(points: Tensor, weights: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Minimise Σ w (x − c)² over the centroids c of the points' clusters by Lloyd's algorithm.

    Args:
        points: float32 [n, d].
        weights: float32 [n, d], positive.
        generator: on the CPU; draws the seeds.

    Returns:
        Centroids, float32 [n_clusters, d]. With fewer distinct points than clusters some centroids are equal.
    """
    centroids = _seed(points, weights, n_clusters, generator)
    for _ in range(_ITERATIONS):
        labels = nearest(points, centroids, weights)
        totals = sum_by_label(weights, labels, n_clusters)
        means = sum_by_label(weights * points, labels, n_clusters) / totals.clamp(min=torch.finfo(torch.float32).tiny)
        counts = torch.bincount(labels, minlength=n_clusters)
        centroids = torch.where(counts[:, None] > 0, means, centroids)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            farthest = _farthest(points, centroids[labels], weights, len(empty))
            centroids[empty[: len(farthest)]] = points[farthest]
    return centroids


def _farthest(points: Tensor, nearest_centroids: Tensor, weights: Tensor, count: int) -> Tensor:
    """Indices of the `count` points that are farthest from their centroids, farthest first."""
    distances = (weights * (points - nearest_centroids).square()).sum(dim=1)
    return distances.cpu().sort(descending=True, stable=True).indices[:count].to(points.device)


def nearest(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each point the index of the centroid of least Σ w (x − c)², int64 [n]; the first of several equal ones.

    Args:
        points: float32 [n, d].
        centroids: float32 [k, d].
        weights: float32 [n, d]; None for weights of one.
    """
    squares = centroids.square()
    terms = torch.cat([squares.sum(dim=1, keepdim=True) if weights is None else squares, -2 * centroids], dim=1)
    values = _GPU_BLOCK_VALUES if points.is_cuda else _BLOCK_VALUES
    block, labels = max(1, values // len(centroids)), []
    for start in range(0, len(points), block):
        part = points[start : start + block]
        weight = part.new_ones(len(part), 1) if weights is None else weights[start : start + block]
        costs = terms @ torch.cat([weight, weight * part], dim=1).T
        # argmin is fast on a GPU, and `_first_argmin` relies on products that are exact for small integers.
        labels.append(costs.argmin(dim=0) if points.is_cuda else _first_argmin(costs))
    return labels[0] if len(labels) == 1 else torch.cat(labels)


def _first_argmin(costs: Tensor) -> Tensor:
    """`costs.argmin(dim=0)` of [k, n], int64 [n]; overwrites `costs`.

    On a CPU `argmin` processes one value at a time. A matrix product counts the entries of each column that equal its
    minimum and adds up their row indices; where there is one such entry, the sum is its row index.
    """
    is_minimum = costs.eq_(costs.amin(dim=0))
    rows = torch.arange(len(costs), dtype=costs.dtype, device=costs.device)
    sums: Tensor = torch.stack([torch.ones_like(rows), rows]) @ is_minimum
    labels, tied = sums[1].long(), (sums[0] != 1).nonzero()[:, 0]
    if len(tied):
        labels[tied] = is_minimum[:, tied].argmax(dim=0)
    return labels


def _seed(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample of the points, by squared distance times mean weight."""
    size = min(len(points), max(_SEED_POINTS, _SEED_POINTS_PER_CENTROID * k))
    sample = torch.randint(len(points), (size,), generator=generator)
    points, importance = points[sample.to(points.device)], weights[sample.to(points.device)].mean(dim=1)
    centroids = points.new_empty(k, points.shape[1])
    centroids[0] = points[0]
    closest = (points - centroids[0]).square().sum(dim=1)
    for cluster in range(1, k):
        # cumsum has no fixed order on CUDA.
        cumulative = (closest * importance).double().cpu().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = int(torch.searchsorted(cumulative, draw).clamp_(max=len(points) - 1))
        centroids[cluster] = points[chosen]
        closest = torch.minimum(closest, (points - points[chosen]).square().sum(dim=1))
    return centroids
