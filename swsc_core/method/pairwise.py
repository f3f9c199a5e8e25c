"""Inner products between points and sets of points, which are all that K-Means needs if a clustering is its labels.

Products [k, n] of cluster means with points come from one of two equivalent computations:

* The Gram matrix of all points, computed once by one GEMM. Seeding reads its rows, and an iteration adds its rows up by
  label. That is bound by memory bandwidth and about ten times cheaper than a GEMM for the channels of a weight matrix.
* A GEMM of means with points in each iteration, where points are many or have few dimensions.

All results are deterministic on CPU and CUDA. On CUDA rows are added up by a one-hot product, because `index_add_` has
no fixed order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Points of the largest Gram matrix, which takes 256 MiB in float32.
_GRAM_POINTS = 8192
# Values of a temporary block: 32 MiB of float32.
_BLOCK_VALUES = 1 << 23
# An addition of scattered rows costs about as much as this many multiplications of a GEMM (measured on a CPU).
_ADDITION_COST = 12


def use_gram(n: int, d: int, k: int, n_init: int) -> bool:
    """Whether to cluster n points of d values into k clusters from the Gram matrix.

    It pays if its n² additions per iteration cost less than the n·k·d multiplications of a GEMM, and enough iterations
    follow to amortize the n²·d multiplications that it takes.
    """
    return n <= min(_GRAM_POINTS, 16 * k * n_init) and _ADDITION_COST * n <= k * d


class PointSpace:
    """Distances between points [n, d] and means of points, by Gram matrix or by GEMM."""

    def __init__(self, points: Tensor, gram: bool) -> None:
        """Points are centred, so that distances from norms and products lose few digits."""
        self.points = points
        self.norms = points.square().sum(dim=1)
        self.gram = points @ points.T if gram else None
        # Error bound of a squared distance from norms and products; points at a smaller distance coincide. Equal points
        # of up to 4096 values differed by 8 epsilon with the kernels of five processors.
        self.rounding = 16 * torch.finfo(torch.float32).eps * float(self.norms.mean())

    def _cleaned(self, distances: Tensor) -> Tensor:
        return distances.masked_fill_(distances <= self.rounding, 0)

    def distances_from(self, rows: Tensor) -> Tensor:
        """Squared distances [len(rows), n] from the points of the given indices to all points."""
        products = self.points[rows] @ self.points.T if self.gram is None else self.gram[rows]
        return self._cleaned(self.norms[rows][:, None] - 2 * products + self.norms)

    def nearest_mean(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Nearest mean of the clustering `labels` for each point, int64 [n], and the squared distance to it, [n]."""
        means, counts = self._means(labels, k)
        if self.gram is None:
            mean_norms, products_of = means.square().sum(dim=1), self._block_products(means)
        else:
            products = means.gather(0, labels[None])[0]  # of each point with the mean of its cluster
            mean_norms = (sum_by_label(products[:, None], labels, k)[:, 0] / counts).clamp_(min=0)
            products_of = lambda start, stop: means[:, start:stop]  # noqa: E731
        # No point joins an empty cluster.
        mean_norms = torch.where(torch.isnan(counts), torch.inf, mean_norms)
        return self._argmin(mean_norms, products_of)

    def merge_costs(self, labels: Tensor, k: int) -> Tensor:
        """Increase of the inertia if clusters i and j are merged (Ward 1963), [k, k]; zero if one of them is empty."""
        means, counts = self._means(labels, k)
        products = means @ means.T if self.gram is None else sum_by_label(means.T, labels, k) / counts[:, None]
        norms = products.diagonal()
        distances = norms[:, None] - 2 * products + norms
        return torch.nan_to_num(distances * (counts[:, None] * counts / (counts[:, None] + counts)))

    def _means(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Means [k, d] of the clusters, or their products [k, n] with all points; counts [k], NaN for empty ones."""
        counts = torch.bincount(labels, minlength=k).to(self.points.dtype)
        means = sum_by_label(self.points if self.gram is None else self.gram, labels, k)
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


def sum_by_label(rows: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sums [k, d] of the rows [n, d] that share a label, int64 [n], in a fixed order."""
    sums = torch.zeros(k, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type == "cpu":
        return sums.index_add_(0, labels, rows)
    return _add_one_hot_products(sums, rows, labels)


def _add_one_hot_products(sums: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Add each row to the sum of its label by one-hot products, a block of rows at a time."""
    block = max(1, _BLOCK_VALUES // len(sums))
    for block_rows, block_labels in zip(torch.split(rows, block), torch.split(labels, block), strict=True):
        sums.addmm_(torch.nn.functional.one_hot(block_labels, len(sums)).to(rows.dtype).T, block_rows)
    return sums


def means_of(points: Tensor, labels: Tensor) -> Tensor:
    """Float32 means [k, d] of the members of each label, summed in float64, a block of columns at a time."""
    k = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).double()[:, None]
    block = max(1, _BLOCK_VALUES // len(points))
    columns = torch.split(points, block, dim=1)
    return torch.cat([(sum_by_label(part.double(), labels, k) / counts).float() for part in columns], dim=1)


def inertia_of(points: Tensor, centroids: Tensor, labels: Tensor) -> float:
    """Sum of squared distances of the points [n, d] to the centroids [k, d] of their labels, in float64."""
    block = max(1, _BLOCK_VALUES // points.shape[1])
    blocks = zip(torch.split(points, block), torch.split(labels, block), strict=True)
    return math.fsum(float((part - centroids[label]).double().square_().sum()) for part, label in blocks)
