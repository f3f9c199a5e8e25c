"""K-Means over the rows of a matrix: greedy k-means++ seeding, Lloyd, several starts, moves across gaps for the best.

A clustering is its labels; a centroid is the mean of its members and never a state of its own. Lloyd then needs
only the inner products of points with means (points.py). Deterministic by seed on CPU and on CUDA: random numbers are
drawn on the CPU.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.checks import require_range
from swsc_core.method.pairwise import PointSpace, inertia_of, means_of, use_gram

_SINGLE_MOVES = 6  # moves of one cluster in vain before a clustering is taken to be at rest
_ROUNDS = 40  # of moves at the most: they bring less and less
_SMALL = 1 << 19  # n * n_clusters up to which a start costs milliseconds, so that many can be afforded
_MANY_STARTS, _FEW_STARTS = 16, 4
_STARTS_PER_REFINED = 4


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of n points of d values.

    Attributes:
        centroids: float32 [k_used, d], each exactly the mean of its members; k_used <= n_clusters, because clusters
            that stay empty (fewer distinct points than clusters) are dropped.
        labels: int64 [n], values in [0, k_used).
        inertia: sum of squared distances of the points to their centroids.
        inertia_history: inertia at each iteration's assignment of the best run of Lloyd; never grows but for rounding.
        converged: labels came to rest, or an iteration gained less than `tolerance`, before `max_iter`.
    """

    centroids: Tensor
    labels: Tensor
    inertia: float
    inertia_history: tuple[float, ...]
    converged: bool


def kmeans(
    points: Tensor,
    n_clusters: int,
    *,
    n_init: int | None = None,
    max_iter: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> KMeansResult:
    """Cluster the rows of `points` (paper, section III-B).

    Args:
        points: floating point [n, d] on any device; not changed. Arithmetic is in float32.
        n_clusters: 1 to n.
        n_init: independent starts; the best quarter of them is refined further, the best of those returned. None: 16
            where n * n_clusters <= 2**19, else 4.
        max_iter: Lloyd iterations of one start at the most.
        tolerance: stop once an iteration lowers the inertia by less than this share. The drop is the sum of the
            squared shifts of the centroids, weighted by cluster size.
        seed: of the random numbers.

    Raises:
        ValueError: n_clusters, n_init or max_iter out of range.
    """
    n = points.shape[0]
    require_range("kmeans", "n_clusters", n_clusters, 1, n)
    n_init, n_refined = starts_and_refined(n, n_clusters, n_init)
    require_range("kmeans", "n_init", n_init, 1, 1000)
    require_range("kmeans", "max_iter", max_iter, 1, 100_000)
    original = points.float()
    # A power of two changes no digit, and keeps squares within float32's range.
    exponent = math.frexp(float(original.abs().max()))[1] if original.numel() else 0
    scale = 2.0 ** -max(-100, min(100, exponent))
    centred = original * scale
    centred -= centred.mean(dim=0)
    space = PointSpace(centred, gram=use_gram(n, points.shape[1], n_clusters, n_init))
    generator = torch.Generator().manual_seed(seed)
    seeds = (_seed(space, n_clusters, generator) for _ in range(n_init))
    starts = [_lloyd(space, labels, closest, n_clusters, max_iter, tolerance) for labels, closest in seeds]
    promising = sorted(starts, key=lambda start: start.inertia)[:n_refined]
    refined = (_refine(space, start, n_clusters, max_iter, tolerance, generator) for start in promising)
    best = min(refined, key=lambda start: start.inertia)
    labels = torch.unique(best.labels, return_inverse=True)[1]  # drops empty clusters, keeps their order
    centroids = means_of(original, labels)
    history = tuple(inertia / scale**2 for inertia in best.history)
    return KMeansResult(centroids, labels, inertia_of(original, centroids, labels), history, best.converged)


def starts_and_refined(n: int, n_clusters: int, n_init: int | None) -> tuple[int, int]:
    """Starts of a clustering of n points, and how many of them are refined."""
    if n_init is None:
        n_init = _MANY_STARTS if n * n_clusters <= _SMALL else _FEW_STARTS
    return n_init, math.ceil(n_init / _STARTS_PER_REFINED)


@dataclass(frozen=True)
class _Clustering:
    """Labels int64 [n], squared distances [n] to the means they were assigned by, and how they came about."""

    labels: Tensor
    distances: Tensor
    history: tuple[float, ...]
    converged: bool

    @property
    def inertia(self) -> float:
        return self.history[-1]


def _lloyd(
    space: PointSpace, labels: Tensor, distances: Tensor, k: int, max_iter: int, tolerance: float
) -> _Clustering:
    history: list[float] = []
    for _ in range(max_iter):
        labels = _fill_empty(labels, distances, k)
        new_labels, distances = space.nearest_mean(labels, k)
        history.append(float(distances.sum(dtype=torch.float64)))
        rests = torch.equal(new_labels, labels)
        labels = new_labels
        if rests or (len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-1]):
            return _Clustering(_fill_empty(labels, distances, k), distances, tuple(history), True)
    return _Clustering(_fill_empty(labels, distances, k), distances, tuple(history), False)


def _seed(space: PointSpace, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Greedy k-means++: each point's nearest seed, int64 [n], and its squared distance, [n]."""
    first = torch.randint(len(space.norms), (1,), generator=generator)
    closest = space.distances_from(first.to(space.norms.device))[0]
    labels = torch.zeros(len(closest), dtype=torch.int64, device=closest.device)
    return _add_seeds(space, labels, closest, list(range(1, k)), generator)


def _add_seeds(
    space: PointSpace, labels: Tensor, closest: Tensor, clusters: list[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Open `clusters` one after the other, each at the best of a few points drawn by squared distance.

    Arthur and Vassilvitskii 2007, sections 2.2 and 6.
    """
    labels, trials = labels.clone(), 2 + int(math.log(len(clusters) + 1))
    for cluster in clusters:
        # cumsum on CUDA sums in no fixed order, and the list is short: draw on the CPU.
        cumulative = closest.double().cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_(max=len(closest) - 1).to(closest.device)
        distances = space.distances_from(candidates)
        improved = torch.minimum(distances, closest)
        best = int(improved.sum(dim=1).argmin())
        labels[distances[best] < closest] = cluster
        closest = improved[best]
    return labels, closest


def _refine(
    space: PointSpace, best: _Clustering, k: int, max_iter: int, tolerance: float, generator: torch.Generator
) -> _Clustering:
    """Merge the closest pairs of clusters, open as many where the error is, run Lloyd, and keep what is better.

    Lloyd cannot move a centroid across a gap. These moves can (in the spirit of Fritzke's breathing K-Means, 2020); they
    end once single ones, each with another pair, do not help.
    """
    moves, vain, rounds = -(-k // 8), 0, 0
    while vain < _SINGLE_MOVES and rounds < _ROUNDS and k > 2:
        rounds += 1
        merged, freed = _merge_closest(space, best.labels, k, moves, skip=vain)
        labels, distances = space.nearest_mean(merged, k)
        labels, distances = _add_seeds(space, labels, distances, freed, generator)
        trial = _lloyd(space, labels, distances, k, max_iter, tolerance)
        if trial.inertia < best.inertia * (1 - tolerance):
            best, vain = trial, 0
        elif moves > 1:
            moves //= 2
        else:
            vain += 1
    return best


def _merge_closest(space: PointSpace, labels: Tensor, k: int, count: int, skip: int) -> tuple[Tensor, list[int]]:
    """Merge up to `count` disjoint pairs of clusters whose merging costs least, after the first `skip` pairs.

    Returns the new labels and the clusters that are free.
    """
    nearest = space.merge_costs(labels, k).fill_diagonal_(torch.inf).min(dim=1)
    costs, others = nearest.values.tolist(), nearest.indices.tolist()
    cost_of = {(min(pair), max(pair)): cost for cost, *pair in zip(costs, range(k), others, strict=True)}
    taken: set[int] = set()
    freed: list[int] = []
    labels = labels.clone()
    for one, other in sorted(cost_of, key=lambda pair: (cost_of[pair], pair))[skip:]:
        if len(freed) == count:
            break
        if one not in taken and other not in taken:
            taken |= {one, other}
            freed.append(other)
            labels[labels == other] = one
    return labels, freed


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
