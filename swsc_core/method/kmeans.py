"""K-Means over the rows of a matrix (paper, section III-B), with several starts and merge-and-reseed moves.

Seeds are drawn by greedy k-means++, and each start runs Lloyd's algorithm. A clustering is represented by its labels; a
centroid is always the mean of its members. Lloyd's algorithm then needs only the inner products of points with means
(pairwise.py). Results are deterministic for a seed on CPU and CUDA: random numbers are drawn on the CPU.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.checks import require_range
from swsc_core.method.pairwise import PointSpace, inertia_of, means_of, use_gram

# Unsuccessful moves of a single cluster, each of another pair, after which refinement ends.
_MAX_FAILED_MOVES = 6
# Rounds of moves at most; later rounds improve the inertia less and less.
_MAX_ROUNDS = 40
# n * n_clusters up to which a start takes milliseconds, so that more starts are made.
_SMALL = 1 << 19
_MANY_STARTS, _FEW_STARTS = 16, 4
# One of so many starts, the best ones, is refined.
_STARTS_PER_REFINED = 4


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of n points of d values.

    Attributes:
        centroids: float32 [k_used, d], each exactly the mean of its members; k_used <= n_clusters, because clusters
            that stay empty (fewer distinct points than clusters) are dropped.
        labels: int64 [n], values in [0, k_used).
        inertia: sum of squared distances of the points to their centroids.
        inertia_history: inertia after each iteration of the best run of Lloyd's algorithm; decreases up to rounding.
        converged: before `max_iter`, labels stopped changing or an iteration gained less than `tolerance`.
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
        n_init: independent starts. The best quarter of them is refined, and the best result of those is returned. None:
            16 starts if n * n_clusters <= 2**19, else 4.
        max_iter: iterations of Lloyd's algorithm per start, at most.
        tolerance: a start ends when an iteration lowers the inertia by less than this share of it. The decrease is the
            sum of the squared shifts of the centroids, weighted by cluster size.
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
    scale = _power_of_two(original)
    centred = original * scale
    centred -= centred.mean(dim=0)
    space = PointSpace(centred, gram=use_gram(n, points.shape[1], n_clusters, n_init))
    search = _Search(space, n_clusters, max_iter, tolerance, torch.Generator().manual_seed(seed))
    best = search.best_of(n_init, n_refined)
    # The inverse indices number the clusters that are not empty, in their order.
    labels = torch.unique(best.labels, return_inverse=True)[1]
    centroids = means_of(original, labels)
    history = tuple(inertia / scale**2 for inertia in best.history)
    return KMeansResult(centroids, labels, inertia_of(original, centroids, labels), history, best.converged)


def _power_of_two(points: Tensor) -> float:
    """Factor that keeps squared distances within the range of float32; as a power of two it changes no digit."""
    exponent = math.frexp(float(points.abs().max()))[1] if points.numel() else 0
    return float(2.0 ** -max(-100, min(100, exponent)))


def starts_and_refined(n: int, n_clusters: int, n_init: int | None) -> tuple[int, int]:
    """Starts for a clustering of n points (`n_init`, or the default for None), and how many of them are refined."""
    if n_init is None:
        n_init = _MANY_STARTS if n * n_clusters <= _SMALL else _FEW_STARTS
    return n_init, math.ceil(n_init / _STARTS_PER_REFINED)


@dataclass(frozen=True)
class _Clustering:
    """Labels int64 [n], and the inertia after each iteration that led to them."""

    labels: Tensor
    history: tuple[float, ...]
    converged: bool

    @property
    def inertia(self) -> float:
        return self.history[-1]


@dataclass(frozen=True)
class _Search:
    """The search for a clustering of the points of `space` into k clusters."""

    space: PointSpace
    k: int
    max_iter: int
    tolerance: float
    generator: torch.Generator

    def best_of(self, n_init: int, n_refined: int) -> _Clustering:
        """Best clustering of `n_init` starts, of which the best `n_refined` are refined."""
        starts = [self._lloyd(*self._seed()) for _ in range(n_init)]
        promising = sorted(starts, key=lambda start: start.inertia)[:n_refined]
        return min(map(self._refine, promising), key=lambda refined: refined.inertia)

    def _seed(self) -> tuple[Tensor, Tensor]:
        """Greedy k-means++: each point's nearest seed, int64 [n], and its squared distance, [n]."""
        norms = self.space.norms
        first = torch.randint(len(norms), (1,), generator=self.generator)
        closest = self.space.distances_from(first.to(norms.device))[0]
        labels = torch.zeros(len(closest), dtype=torch.int64, device=closest.device)
        return self._add_seeds(labels, closest, list(range(1, self.k)))

    def _add_seeds(self, labels: Tensor, closest: Tensor, clusters: list[int]) -> tuple[Tensor, Tensor]:
        """Open `clusters` one after the other, each at the best of a few points drawn by squared distance.

        Arthur and Vassilvitskii 2007, sections 2.2 and 6.
        """
        labels, trials = labels.clone(), 2 + int(math.log(len(clusters) + 1))
        for cluster in clusters:
            # cumsum has no fixed order on CUDA, and the list is short: draw on the CPU.
            cumulative = closest.double().cpu().cumsum(0)
            draws = torch.rand(trials, generator=self.generator, dtype=torch.float64) * cumulative[-1]
            candidates = torch.searchsorted(cumulative, draws).clamp_(max=len(closest) - 1).to(closest.device)
            distances = self.space.distances_from(candidates)
            improved = torch.minimum(distances, closest)
            best = int(improved.sum(dim=1).argmin())
            labels[distances[best] < closest] = cluster
            closest = improved[best]
        return labels, closest

    def _lloyd(self, labels: Tensor, distances: Tensor) -> _Clustering:
        """Lloyd's algorithm from labels, int64 [n], and squared distances [n] to the centroids that they name."""
        history: list[float] = []
        for _ in range(self.max_iter):
            labels = _fill_empty(labels, distances, self.k)
            new_labels, distances = self.space.nearest_mean(labels, self.k)
            history.append(float(distances.sum(dtype=torch.float64)))
            unchanged = torch.equal(new_labels, labels)
            labels = new_labels
            if unchanged or (len(history) > 1 and history[-2] - history[-1] <= self.tolerance * history[-1]):
                return _Clustering(_fill_empty(labels, distances, self.k), tuple(history), True)
        return _Clustering(_fill_empty(labels, distances, self.k), tuple(history), False)

    def _refine(self, best: _Clustering) -> _Clustering:
        """Improve a clustering by moves: merge the closest pairs of clusters, and open as many where the error is.

        A move is kept if Lloyd's algorithm then ends with a smaller inertia. Lloyd's algorithm cannot move a centroid
        across a gap. These moves can (similar to Fritzke's breathing K-Means, 2020); they end when moves of a single
        cluster, each of another pair, do not help.
        """
        moves, failed, rounds = -(-self.k // 8), 0, 0
        while failed < _MAX_FAILED_MOVES and rounds < _MAX_ROUNDS and self.k > 2:
            rounds += 1
            merged, freed = _merge_closest(self.space, best.labels, self.k, moves, skip=failed)
            trial = self._lloyd(*self._add_seeds(*self.space.nearest_mean(merged, self.k), freed))
            if trial.inertia < best.inertia * (1 - self.tolerance):
                best, failed = trial, 0
            elif moves > 1:
                moves //= 2
            else:
                failed += 1
        return best


def _merge_closest(space: PointSpace, labels: Tensor, k: int, count: int, skip: int) -> tuple[Tensor, list[int]]:
    """Merge up to `count` disjoint pairs of clusters, those of least cost first, without the first `skip` pairs.

    Returns:
        The new labels, int64 [n], and the clusters that are now empty.
    """
    nearest = space.merge_costs(labels, k).fill_diagonal_(torch.inf).min(dim=1)
    costs, neighbours = nearest.values.tolist(), nearest.indices.tolist()
    cost_of = {(min(pair), max(pair)): cost for cost, *pair in zip(costs, range(k), neighbours, strict=True)}
    merged: set[int] = set()
    freed: list[int] = []
    labels = labels.clone()
    for lower, upper in sorted(cost_of, key=lambda pair: (cost_of[pair], pair))[skip:]:
        if len(freed) == count:
            break
        if lower not in merged and upper not in merged:
            merged |= {lower, upper}
            freed.append(upper)
            labels[labels == upper] = lower
    return labels, freed


def _fill_empty(labels: Tensor, distances: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point that is farthest from its centroid; no cluster loses its last member.

    As in scikit-learn. Clusters stay empty if all remaining points coincide with their centroids.
    """
    counts = torch.bincount(labels, minlength=k).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    if not empty:
        return labels
    labels = labels.clone()
    farthest = distances.cpu().sort(descending=True, stable=True)
    for distance, point in zip(farthest.values.tolist(), farthest.indices.tolist(), strict=True):
        donor = int(labels[point])
        if distance <= 0 or not empty:
            break
        if counts[donor] > 1:
            counts[donor] -= 1
            labels[point] = empty.pop(0)
    return labels
