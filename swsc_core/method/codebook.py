"""A first codebook for short segments: K-Means with a weight for every coordinate of every point.

Not `kmeans`: that one spares no effort on some thousand long points; here are millions of short ones, a sample of them
says all, and what follows (error feedback, refits) moves the centroids anyway.
"""

import torch
from torch import Tensor

from swsc_core.method.pairwise import sum_by_label

_SAMPLES, _SAMPLES_PER_CENTROID = 1 << 15, 128  # segments that a codebook is learnt from: the larger of the two
_SEEDED, _SEEDED_PER_CENTROID = 1 << 12, 16  # of them, those that k-means++ draws seeds from
_ITERATIONS = 12
_BLOCK_VALUES, _GPU_BLOCK_VALUES = 1 << 19, 1 << 24  # distances that are held at a time: 2 MiB, what a cache holds


def sample_size(n_clusters: int) -> int:
    """Number of segments that a codebook is learnt from."""
    return max(_SAMPLES, _SAMPLES_PER_CENTROID * n_clusters)


def weighted_kmeans(points: Tensor, weights: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids [n_clusters, d] of `points` [n, d] that lower Σ w (x − c)², w [n, d] > 0.

    With fewer distinct points than clusters some centroids are equal.
    """
    centroids = _seed(points, weights, n_clusters, generator)
    for _ in range(_ITERATIONS):
        labels = nearest(points, centroids, weights)
        total = sum_by_label(weights, labels, n_clusters)
        means = sum_by_label(weights * points, labels, n_clusters) / total.clamp(min=torch.finfo(torch.float32).tiny)
        counts = torch.bincount(labels, minlength=n_clusters)
        centroids = torch.where(counts[:, None] > 0, means, centroids)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            distances = (weights * (points - centroids[labels]).square()).sum(dim=1)
            far = distances.cpu().sort(descending=True, stable=True).indices[: len(empty)].to(points.device)
            centroids[empty[: len(far)]] = points[far]
    return centroids


def nearest(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each point the centroid of least Σ w (x − c)², int64 [n] (the first, if equal); w is [n, d], or one."""
    squares = centroids.square()
    ours = torch.cat([squares.sum(dim=1, keepdim=True) if weights is None else squares, -2 * centroids], dim=1)
    values = _GPU_BLOCK_VALUES if points.is_cuda else _BLOCK_VALUES
    block, labels = max(1, values // len(centroids)), []
    for start in range(0, len(points), block):
        part = points[start : start + block]
        weight = part.new_ones(len(part), 1) if weights is None else weights[start : start + block]
        costs = ours @ torch.cat([weight, weight * part], dim=1).T
        # a GPU finds the first of the least by itself; numbers of rows in a product would have to survive its rounding
        labels.append(costs.argmin(dim=0) if points.is_cuda else _first_least(costs))
    return labels[0] if len(labels) == 1 else torch.cat(labels)


def _first_least(costs: Tensor) -> Tensor:
    """Row of the least value of each column of `costs` [k, n], int64 [n]; `costs` is written over.

    In place of `argmin`, which looks at one value at a time on a CPU: a product counts the values equal to the least one
    and adds up their rows, which is the row asked for where there is one.
    """
    least = costs.eq_(costs.amin(dim=0))
    rows = torch.arange(len(costs), dtype=costs.dtype, device=costs.device)
    count, total = torch.stack([torch.ones_like(rows), rows]) @ least
    labels, unclear = total.long(), (count != 1).nonzero()[:, 0]
    if len(unclear):
        labels[unclear] = least[:, unclear].argmax(dim=0)
    return labels


def _seed(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ on some of the points, by squared distance times mean weight."""
    some = torch.randint(len(points), (min(len(points), max(_SEEDED, _SEEDED_PER_CENTROID * k)),), generator=generator)
    points, importance = points[some.to(points.device)], weights[some.to(points.device)].mean(dim=1)
    centroids = points.new_empty(k, points.shape[1])
    centroids[0] = points[0]
    closest = (points - centroids[0]).square().sum(dim=1)
    for cluster in range(1, k):
        cumulative = (closest * importance).double().cpu().cumsum(0)  # on CUDA cumsum has no fixed order
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = int(torch.searchsorted(cumulative, draw).clamp_(max=len(points) - 1))
        centroids[cluster] = points[chosen]
        closest = torch.minimum(closest, (points - points[chosen]).square().sum(dim=1))
    return centroids
