"""Points and the inner products of sets of them: all that a clustering which is its labels needs to know.

Products [k, n] of cluster means with points come by one of two routes with the same meaning:

* the Gram matrix of all points is made once by one GEMM. Seeding reads its rows, and an iteration adds them up by
  label, which is bound by memory and, for the channels of a weight matrix, about ten times cheaper than the GEMM;
* GEMM of means with points, where the points are many or have few dimensions.

Everything is deterministic, on CPU and on CUDA: there, rows are added up by a one-hot product, because `index_add_` sums
in random order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_GRAM_POINTS = 8192  # largest Gram matrix: 8192**2 float32 = 256 MiB
_BLOCK_VALUES = 1 << 23  # 32 MiB of float32: bound of a temporary block


def use_gram(n: int, d: int, k: int, n_init: int) -> bool:
    """Whether n**2 additions an iteration beat n*k*d multiplications of a GEMM, and the n**2 * d of a Gram matrix its use.

    The twelve was measured on a CPU: an addition of scattered rows costs about as much as that many multiplications.
    """
    return n <= min(_GRAM_POINTS, 16 * k * n_init) and 12 * n <= k * d


class PointSpace:
    """Inner products between points and sets of points, by Gram matrix or by GEMM."""

    def __init__(self, points: Tensor, gram: bool) -> None:
        self.points = points  # [n, d], centred: distances from norms and products then lose few digits
        self.norms = points.square().sum(dim=1)
        self.gram = points @ points.T if gram else None
        # What a squared distance taken from norms and products may be wrong by: below it, points coincide. For equal points of up
        # to 4096 values, 8 epsilon were seen under the kernels of five processors.
        self.rounding = 16 * torch.finfo(torch.float32).eps * float(self.norms.mean())

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
            mean_norms = (sum_by_label(own[:, None], labels, k)[:, 0] / counts).clamp_(min=0)
            products_of = lambda start, stop: means[:, start:stop]  # noqa: E731
        mean_norms = torch.where(torch.isnan(counts), torch.inf, mean_norms)  # no point joins an empty cluster
        return self._argmin(mean_norms, products_of)

    def merge_costs(self, labels: Tensor, k: int) -> Tensor:
        """How much the inertia grows when clusters i and j become one, [k, k]; zero where one of them is empty (Ward 1963)."""
        means, counts = self._means(labels, k)
        products = means @ means.T if self.gram is None else sum_by_label(means.T, labels, k) / counts[:, None]
        norms = products.diagonal()
        distances = norms[:, None] - 2 * products + norms
        return torch.nan_to_num(distances * (counts[:, None] * counts / (counts[:, None] + counts)))

    def _means(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Means [k, d] of the clusters, or their products [k, n] with all points; and counts [k], NaN for empty ones."""
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
    """Sums [k, d] of the rows [n, d] that share a label, in a fixed order."""
    sums = torch.zeros(k, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type == "cpu":
        return sums.index_add_(0, labels, rows)
    return _add_products(sums, rows, labels)


def _add_products(sums: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Add each row to the sum of its label by one-hot products, a block of rows at a time."""
    block = max(1, _BLOCK_VALUES // len(sums))
    for part, own in zip(rows.split(block), labels.split(block), strict=True):
        sums.addmm_(torch.nn.functional.one_hot(own, len(sums)).to(rows.dtype).T, part)
    return sums


def means_of(points: Tensor, labels: Tensor) -> Tensor:
    """Float32 means [k, d] of the members of each label, summed in float64, a block of columns at a time."""
    k = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).double()[:, None]
    block = max(1, _BLOCK_VALUES // len(points))
    parts = [(sum_by_label(part.double(), labels, k) / counts).float() for part in points.split(block, dim=1)]
    return torch.cat(parts, dim=1)


def inertia_of(points: Tensor, centroids: Tensor, labels: Tensor) -> float:
    """Sum of squared distances of the points [n, d] to the centroids [k, d] of their labels, in float64."""
    block = max(1, _BLOCK_VALUES // points.shape[1])
    pairs = zip(points.split(block), labels.split(block), strict=True)
    return math.fsum(float((part - centroids[own]).double().square_().sum()) for part, own in pairs)
