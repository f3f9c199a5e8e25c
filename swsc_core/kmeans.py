"""K-Means over the rows of a matrix: greedy k-means++ seeding, Lloyd, several starts, moves across gaps for the best.

A clustering is its labels; a centroid is the mean of its members and never a state of its own. Lloyd then needs
only the inner products of points with centroids, [k, n], which come by one of two routes with the same meaning:

* the Gram matrix of all points is made once by one GEMM. Seeding reads its rows, and an iteration adds them up by
  label, which is bound by memory and, for the channels of a weight matrix, about ten times cheaper than the GEMM;
* GEMM of centroids with points, where the points are many or have few dimensions.

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
_SINGLE_MOVES = 6  # moves of one cluster in vain before a clustering is taken to be at rest
_ROUNDS = 40  # of moves at the most: they bring less and less
_SMALL = 1 << 19  # n * n_clusters up to which a start costs milliseconds, so that many can be afforded
_MANY_STARTS, _FEW_STARTS = 16, 4
_STARTS_PER_REFINED = 4
_BLOCK_VALUES = 1 << 23  # 32 MiB of float32: bound of a temporary block


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
    n_init = (_MANY_STARTS if n * n_clusters <= _SMALL else _FEW_STARTS) if n_init is None else n_init
    require_range("kmeans", "n_init", n_init, 1, 1000)
    require_range("kmeans", "max_iter", max_iter, 1, 100_000)
    original = points.float()
    space = _Space(original - original.mean(dim=0), gram=_gram_pays(n, points.shape[1], n_clusters, n_init))
    generator = torch.Generator().manual_seed(seed)
    seeds = (_seed(space, n_clusters, generator) for _ in range(n_init))
    starts = [_lloyd(space, labels, closest, n_clusters, max_iter, tolerance) for labels, closest in seeds]
    promising = sorted(starts, key=lambda start: start.inertia)[: math.ceil(n_init / _STARTS_PER_REFINED)]
    refined = (_refine(space, start, n_clusters, max_iter, tolerance, generator) for start in promising)
    best = min(refined, key=lambda start: start.inertia)
    labels = torch.unique(best.labels, return_inverse=True)[1]  # drops empty clusters, keeps their order
    centroids = _means(original, labels)
    return KMeansResult(centroids, labels, _inertia(original, centroids, labels), best.history, best.converged)


def _gram_pays(n: int, d: int, k: int, n_init: int) -> bool:
    """Whether n**2 additions an iteration beat n*k*d multiplications of a GEMM, and the n**2 * d of a Gram matrix its use.

    The twelve was measured on a CPU: an addition of scattered rows costs about as much as that many multiplications.
    """
    return n <= min(_GRAM_POINTS, 16 * k * n_init) and 12 * n <= k * d


class _Space:
    """Inner products between points and sets of points, by Gram matrix or by GEMM."""

    def __init__(self, points: Tensor, gram: bool) -> None:
        self.points = points  # [n, d], centred: distances from norms and products then lose few digits
        self.norms = points.square().sum(dim=1)
        self.gram = points @ points.T if gram else None
        # What a squared distance taken from norms and products may be wrong by: below it, points coincide.
        self.rounding = 4 * torch.finfo(torch.float32).eps * float(self.norms.mean())

    def _cleaned(self, distances: Tensor) -> Tensor:
        return distances.masked_fill_(distances <= self.rounding, 0)

    def distances_from(self, rows: Tensor) -> Tensor:
        """Squared distances [len(rows), n] from the points `rows` to all points."""
        products = self.points[rows] @ self.points.T if self.gram is None else self.gram[rows]
        return self._cleaned(self.norms[rows][:, None] - 2 * products + self.norms)

    def nearest_mean(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """For each point its nearest cluster mean of the clustering `labels` and the squared distance, both [n]."""
        means, counts = self._means(labels, k)
        if self.gram is None:
            mean_norms, products_of = means.square().sum(dim=1), self._block_products(means)
        else:
            own = means.gather(0, labels[None])[0]  # product of each point with its own mean
            mean_norms = (_sum_by_label(own[:, None], labels, k)[:, 0] / counts).clamp_(min=0)
            products_of = lambda start, stop: means[:, start:stop]  # noqa: E731
        mean_norms = torch.where(torch.isnan(counts), torch.inf, mean_norms)  # no point joins an empty cluster
        return self._argmin(mean_norms, products_of)

    def merge_costs(self, labels: Tensor, k: int) -> Tensor:
        """How much the inertia grows when clusters i and j become one, [k, k]; zero where one of them is empty (Ward 1963)."""
        means, counts = self._means(labels, k)
        products = means @ means.T if self.gram is None else _sum_by_label(means.T, labels, k) / counts[:, None]
        norms = products.diagonal()
        distances = norms[:, None] - 2 * products + norms
        return torch.nan_to_num(distances * (counts[:, None] * counts / (counts[:, None] + counts)))

    def _means(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Means [k, d] of the clusters, or their products [k, n] with all points; and counts [k], NaN for empty ones."""
        counts = torch.bincount(labels, minlength=k).to(self.points.dtype)
        means = _sum_by_label(self.points if self.gram is None else self.gram, labels, k)
        means /= counts.clamp(min=1)[:, None]
        return means, torch.where(counts > 0, counts, torch.nan)

    def _block_products(self, means: Tensor) -> Callable[[int, int], Tensor]:
        return lambda start, stop: means @ self.points[start:stop].T

    def _argmin(self, mean_norms: Tensor, products_of: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
        n, block = len(self.norms), max(1, _BLOCK_VALUES // len(mean_norms))
        labels, distances = [], []
        for start in range(0, n, block):
            smallest = (mean_norms[:, None] - 2 * products_of(start, min(n, start + block))).min(dim=0)
            labels.append(smallest.indices)
            distances.append(self._cleaned(smallest.values + self.norms[start : start + block]))
        return torch.cat(labels), torch.cat(distances)


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


def _lloyd(space: _Space, labels: Tensor, distances: Tensor, k: int, max_iter: int, tolerance: float) -> _Clustering:
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


def _seed(space: _Space, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Greedy k-means++: each point's nearest seed, int64 [n], and its squared distance, [n]."""
    first = torch.randint(len(space.norms), (1,), generator=generator)
    closest = space.distances_from(first.to(space.norms.device))[0]
    labels = torch.zeros(len(closest), dtype=torch.int64, device=closest.device)
    return _add_seeds(space, labels, closest, list(range(1, k)), generator)


def _add_seeds(
    space: _Space, labels: Tensor, closest: Tensor, clusters: list[int], generator: torch.Generator
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
    space: _Space, best: _Clustering, k: int, max_iter: int, tolerance: float, generator: torch.Generator
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


def _merge_closest(space: _Space, labels: Tensor, k: int, count: int, skip: int) -> tuple[Tensor, list[int]]:
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
