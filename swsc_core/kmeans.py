"""K-Means over the rows of a matrix: greedy k-means++ seeding, Lloyd iterations, best of several starts.

A clustering is its labels; a centroid is the mean of its members and never a state of its own. Lloyd then needs
only the inner products of points with centroids, [k, n], which come by one of two routes with the same meaning:

* few points (n <= 8192): the Gram matrix of all points is made once by one GEMM. Seeding reads its rows, and an
  iteration adds them up by label, which is bound by memory and about ten times cheaper than a GEMM with centroids;
* many points: GEMM of centroids with points.

Everything is deterministic by seed on CPU and on CUDA (random numbers are drawn on the CPU; on CUDA rows are added
up by a one-hot product, because `index_add_` sums there in random order).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.checks import require_range

_GRAM_POINTS = 8192  # largest Gram matrix: 8192**2 float32 = 256 MiB
_BLOCK_VALUES = 1 << 23  # 32 MiB of float32: bound of a temporary block


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of n points of d values.

    Attributes:
        centroids: float32 [k_used, d], each exactly the mean of its members; k_used <= n_clusters, because clusters
            that stay empty (fewer distinct points than clusters) are dropped.
        labels: int64 [n], values in [0, k_used).
        inertia: sum of squared distances of the points to their centroids.
        inertia_history: inertia at each iteration's assignment of the best start; never grows but for rounding.
        converged: labels came to rest, or an iteration gained less than `tolerance`, before `max_iter`.
    """

    centroids: Tensor
    labels: Tensor
    inertia: float
    inertia_history: tuple[float, ...]
    converged: bool


def kmeans(
    points: Tensor, n_clusters: int, *, n_init: int = 8, max_iter: int = 100, tolerance: float = 1e-5, seed: int = 0
) -> KMeansResult:
    """Cluster the rows of `points` (paper, section III-B).

    Args:
        points: floating point [n, d] on any device; not changed. Arithmetic is in float32.
        n_clusters: 1 to n.
        n_init: independent starts; the one of smallest inertia is returned.
        max_iter: Lloyd iterations of one start at the most.
        tolerance: stop once an iteration lowers the inertia by less than this share. The drop is the sum of the
            squared shifts of the centroids, weighted by cluster size.
        seed: of the random numbers.

    Raises:
        ValueError: n_clusters, n_init or max_iter out of range.
    """
    n = points.shape[0]
    require_range("kmeans", "n_clusters", n_clusters, 1, n)
    require_range("kmeans", "n_init", n_init, 1, 1000)
    require_range("kmeans", "max_iter", max_iter, 1, 100_000)
    original = points.float()
    space = _Space(original - original.mean(dim=0), gram=n <= min(_GRAM_POINTS, 16 * n_clusters * n_init))
    generator = torch.Generator().manual_seed(seed)
    starts = [_one_start(space, n_clusters, max_iter, tolerance, generator) for _ in range(n_init)]
    labels, history, converged = min(starts, key=lambda start: start[1][-1])
    labels = torch.unique(labels, return_inverse=True)[1]  # drops empty clusters, keeps their order
    centroids = _means(original, labels)
    return KMeansResult(centroids, labels, _inertia(original, centroids, labels), tuple(history), converged)


class _Space:
    """Inner products between points and sets of points, by Gram matrix or by GEMM."""

    def __init__(self, points: Tensor, gram: bool) -> None:
        self.points = points  # [n, d], centred: distances from norms and products then lose few digits
        self.norms = points.square().sum(dim=1)
        self.gram = points @ points.T if gram else None

    def distances_from(self, rows: Tensor) -> Tensor:
        """Squared distances [len(rows), n] from the points `rows` to all points."""
        products = self.points[rows] @ self.points.T if self.gram is None else self.gram[rows]
        return (self.norms[rows][:, None] - 2 * products + self.norms).clamp_(min=0)

    def nearest_mean(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """For each point its nearest cluster mean of the clustering `labels` and the squared distance, both [n]."""
        counts = torch.bincount(labels, minlength=k).to(self.points.dtype)
        sums = _sum_by_label(self.points if self.gram is None else self.gram, labels, k)
        sums /= counts.clamp(min=1)[:, None]  # [k, d] means, or [k, n] products of means with points
        if self.gram is None:
            mean_norms, products_of = sums.square().sum(dim=1), self._block_products(sums)
        else:
            own = sums.gather(0, labels[None])[0]  # product of each point with its own mean
            mean_norms = torch.zeros_like(counts, dtype=torch.float64).cpu()
            mean_norms.index_add_(0, labels.cpu(), own.double().cpu())
            mean_norms = (mean_norms.to(counts) / counts.clamp(min=1)).clamp_(min=0)
            products_of = lambda start, stop: sums[:, start:stop]  # noqa: E731
        mean_norms = torch.where(counts > 0, mean_norms, torch.inf)  # no point joins an empty cluster
        return self._argmin(mean_norms, products_of)

    def _block_products(self, means: Tensor) -> Callable[[int, int], Tensor]:
        return lambda start, stop: means @ self.points[start:stop].T

    def _argmin(self, mean_norms: Tensor, products_of: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
        n, block = len(self.norms), max(1, _BLOCK_VALUES // len(mean_norms))
        labels, distances = [], []
        for start in range(0, n, block):
            smallest = (mean_norms[:, None] - 2 * products_of(start, min(n, start + block))).min(dim=0)
            labels.append(smallest.indices)
            distances.append((smallest.values + self.norms[start : start + block]).clamp_(min=0))
        return torch.cat(labels), torch.cat(distances)


def _one_start(
    space: _Space, k: int, max_iter: int, tolerance: float, generator: torch.Generator
) -> tuple[Tensor, list[float], bool]:
    labels, distances = _seed(space, k, generator)
    history: list[float] = []
    for _ in range(max_iter):
        labels = _fill_empty(labels, distances, k)
        new_labels, distances = space.nearest_mean(labels, k)
        history.append(float(distances.sum(dtype=torch.float64)))
        if torch.equal(new_labels, labels):
            return labels, history, True
        labels = new_labels
        if len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-1]:
            return _fill_empty(labels, distances, k), history, True
    return _fill_empty(labels, distances, k), history, False


def _seed(space: _Space, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007, section 6): the best of a few candidates at each step.

    Returns each point's nearest seed, int64 [n], and its squared distance, [n].
    """
    n, trials = len(space.norms), 2 + int(math.log(k))
    first = torch.randint(n, (1,), generator=generator)
    closest = space.distances_from(first.to(space.norms.device))[0]
    labels = torch.zeros(n, dtype=torch.int64, device=closest.device)
    for cluster in range(1, k):
        # cumsum on CUDA sums in no fixed order, and the list is short: draw on the CPU.
        cumulative = closest.double().cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_(max=n - 1).to(closest.device)
        distances = space.distances_from(candidates)
        improved = torch.minimum(distances, closest)
        best = int(improved.sum(dim=1).argmin())
        labels[distances[best] < closest] = cluster
        closest = improved[best]
    return labels, closest


def _fill_empty(labels: Tensor, distances: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point that is farthest from its centroid; no cluster loses its last member.

    Clusters stay empty when every remaining point coincides with its centroid.
    """
    counts = torch.bincount(labels, minlength=k).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    if not empty:
        return labels
    labels = labels.clone()
    far = distances.cpu().sort(descending=True, stable=True)
    for distance, point in zip(far.values.tolist(), far.indices.tolist(), strict=True):
        donor = int(labels[point])
        if distance <= 0 or not empty:
            break
        if counts[donor] > 1:
            counts[donor] -= 1
            labels[point] = empty.pop(0)
    return labels


def _sum_by_label(rows: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sums [k, d] of the rows [n, d] that share a label, in a fixed order."""
    sums = torch.zeros(k, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type == "cpu":
        return sums.index_add_(0, labels, rows)
    return torch.nn.functional.one_hot(labels, k).to(rows.dtype).T @ rows


def _means(points: Tensor, labels: Tensor) -> Tensor:
    """Float32 means [k, d] of the members of each label, summed in float64, a block of columns at a time."""
    k = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).double()[:, None]
    block = max(1, _BLOCK_VALUES // len(points))
    parts = [(_sum_by_label(part.double(), labels, k) / counts).float() for part in points.split(block, dim=1)]
    return torch.cat(parts, dim=1)


def _inertia(points: Tensor, centroids: Tensor, labels: Tensor) -> float:
    block = max(1, _BLOCK_VALUES // points.shape[1])
    pairs = zip(points.split(block), labels.split(block), strict=True)
    return math.fsum(float((part - centroids[own]).square().sum(dtype=torch.float64)) for part, own in pairs)
