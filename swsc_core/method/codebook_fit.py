"""Fit of labels, codebooks and row scales to a matrix in any metric; each is improved while the others are fixed.

The steps are those of Lloyd's algorithm, taken in the metric of the error (metric.py):

* `assign` visits blocks of columns from the last to the first and adds the error of each block to the target of the
  columns to its left. GPTQ (Frantar et al. 2022) and GPTVQ (van Baalen et al. 2024) do the same from left to right.
  Updates of distant columns are collected and applied by one GEMM.
* `reassign` visits the blocks again, each with the labels of all other blocks fixed: coordinate descent.
* `refit` solves for scales and centroids by least squares.

In the plain metric with whole channels this is Lloyd's algorithm as the paper uses it (section III-B). With a given
codebook rows do not depend on each other: they are processed in slabs, so that temporaries do not grow with the matrix.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from swsc_core.method.metric import Metric
from swsc_core.method.segmentation import GPU_SLAB_WEIGHTS, Slab, slab_values
from swsc_core.method.spec import SwscSpec
from swsc_core.method.stored_values import StoredValues, store_scales, store_values
from swsc_core.method.weighted_kmeans import sample_size, weighted_kmeans

# Columns after which the updates of all further columns of a slab are applied.
_LAZY_COLUMNS = 128
# Steps of conjugate gradients per refit. The next refit starts where this one ended; twelve steps ended with the same
# weighted errors (docs/experiments.md).
CONJUGATE_STEPS = 4


class CodebookFit:
    """Labels, codebooks and scales of one matrix. The target of a step may change from step to step.

    Attributes:
        labels: int32 `layout.grid`, counted within the codebook of their rows.
        centroids: as stored, [codebooks * k, size]; each codebook serves an equal number of rows.
        scales: float32 [m, 1] as stored, or None for rows without scales.
    """

    def __init__(
        self,
        weight: Tensor,
        metric: Metric,
        spec: SwscSpec,
        dtype: torch.dtype,
        *,
        slab_weights: int | None = None,
        lazy_columns: int = _LAZY_COLUMNS,
    ) -> None:
        """Start without clusters; the scales of rows are their root mean squares.

        Args:
            weight: float32 [m, n].
            dtype: of stored centroids and scales.
            slab_weights: weights that are processed at a time; None: by device and size of the matrix.
            lazy_columns: columns after which the updates of all further columns are applied.
        """
        self.metric, self.spec, self.dtype = metric, spec, dtype
        self.layout = spec.layout((weight.shape[0], weight.shape[1]))
        self._slab_weights = slab_weights or (GPU_SLAB_WEIGHTS if weight.is_cuda else slab_values(weight.numel()))
        self._lazy_columns = lazy_columns
        self.labels = torch.zeros(self.layout.grid, dtype=torch.int32, device=weight.device)
        rms = weight.square().mean(dim=1, keepdim=True).sqrt()
        self.scales = self._stored_scales(rms) if spec.scaled else None
        self.centroids = store_values(weight.new_zeros(0, self.layout.size), None, dtype)

    def adopt(self, labels: Tensor, centroids: Tensor) -> None:
        """Start from a clustering of the unscaled segments: labels int64 [count], float32 centroids [k, size]."""
        self.labels = labels.reshape(self.layout.grid).int()
        self.centroids = self._stored(centroids)

    def start(self, target: Tensor, generator: torch.Generator) -> None:
        """Learn the first codebooks from a sample of the segments of `target` [m, n]."""
        groups = self.layout.row_groups(self.spec.codebooks)
        self.centroids = self._stored(torch.cat([self._first_codebook(target, rows, generator) for rows in groups]))

    def assign(self, target: Tensor, *, feedback: bool) -> None:
        """Assign every segment of `target`, from the last column to the first.

        With `feedback` the error of each block is added to the targets of the blocks before it; without effect in the
        plain metric.
        """
        centroids, roots = self.centroids.expand(), self._block_roots(feedback)
        for slab in self._slabs():
            if feedback and roots:
                self._assign_with_feedback(slab, target[slab.rows], centroids, roots)
            else:
                self._assign_independently(slab, target[slab.rows], centroids, roots)

    def reassign(self, target: Tensor) -> None:
        """Assign every segment again while all others are fixed; the weighted error does not increase."""
        centroids, roots = self.centroids.expand(), self._block_roots(feedback=False)
        for slab in self._slabs():
            if roots:
                self._descend(slab, target[slab.rows], centroids, roots)
            else:
                self._assign_independently(slab, target[slab.rows], centroids, roots)

    def refit(self, target: Tensor) -> None:
        """Least squares for the scales, then for the centroids, in the metric of the error."""
        if self.scales is not None:
            self._refit_scales(self.scales, target)
        self.centroids = self._stored(self._refit_centroids(target))

    def weighted_error(self, target: Tensor) -> float:
        """Weighted error of the stored values as an approximation of `target`."""
        centroids = self.centroids.expand()
        errors = ((slab.rows.start, target[slab.rows] - slab.clustered(centroids)) for slab in self._slabs())
        return math.fsum(self.metric.weighted_error(error, first) for first, error in errors)

    def clustered(self) -> Tensor:
        """W′, float32 [m, n]."""
        centroids = self.centroids.expand()
        clustered = torch.empty(self.layout.m, self.layout.n, dtype=torch.float32, device=centroids.device)
        for slab in self._slabs():
            clustered[slab.rows] = slab.clustered(centroids)
        return clustered

    def unscaled(self, target: Tensor) -> Tensor:
        """`target` with each row divided by its scale."""
        return target if self.scales is None else target / self.scales

    def snapshot(self) -> tuple[Tensor, StoredValues, Tensor | None]:
        """Labels, centroids and scales, for `put_back`."""
        return self.labels.clone(), self.centroids, None if self.scales is None else self.scales.clone()

    def put_back(self, snapshot: tuple[Tensor, StoredValues, Tensor | None]) -> None:
        """Return to the state of a snapshot."""
        self.labels, self.centroids, self.scales = snapshot

    def _first_codebook(self, target: Tensor, group: slice, generator: torch.Generator) -> Tensor:
        layout, size = self.layout, sample_size(self.spec.n_clusters)
        first, count = (rows * layout.n // layout.size for rows in (group.start, group.stop - group.start))
        sample = torch.arange(count) if count <= size else torch.randint(count, (size,), generator=generator)
        rows, columns = layout.weight_indices(sample.sort().values.to(target.device) + first)
        points, column_weights = target[rows, columns], self.metric.column_weights
        weights = torch.ones_like(points) if column_weights is None else column_weights[columns]
        if self.scales is not None:
            scales = self.scales[rows, 0]
            points, weights = points / scales, weights * scales.square()
        if self.metric.row_weights is not None:
            weights = weights * self.metric.row_weights[rows]
        return weighted_kmeans(points, weights, self.spec.n_clusters, generator)

    def _block_roots(self, feedback: bool) -> tuple[Tensor, ...]:
        """For each block of columns the transform after which plain distances are those of the metric; none for H = I.

        With feedback it is the block on the diagonal of L, because columns that are assigned later compensate the
        remaining cost of an error. Without, it is the root of the block on the diagonal of H.
        """
        hessian, width = self.metric.hessian, self.layout.width
        if hessian is None:
            return ()
        if feedback:
            return _diagonal_blocks(self.metric.root, width).unbind()
        return self.metric.factor(_diagonal_blocks(hessian, width)).unbind()

    def _assign_independently(self, slab: Slab, target: Tensor, centroids: Tensor, roots: Sequence[Tensor]) -> None:
        for columns, root in zip_longest(self.layout.blocks(), roots):  # None for each block in the plain metric
            slab.assign_block(columns, target[:, columns], centroids, root)

    def _assign_with_feedback(self, slab: Slab, target: Tensor, centroids: Tensor, roots: Sequence[Tensor]) -> None:
        layout, root = self.layout, self.metric.root
        errors = torch.zeros_like(target)
        for group in reversed(list(layout.block_groups(self._lazy_columns))):
            # What the errors of later columns contribute to these columns of the whitened error E L.
            remainder = errors[:, group.stop :] @ root[group.stop :, group]
            for columns in reversed(list(layout.blocks(group))):
                corner, first = roots[columns.start // layout.width], columns.start - group.start
                correction = torch.linalg.solve_triangular(
                    corner, remainder[:, first : first + layout.width], upper=False, left=False
                )
                clustered = slab.assign_block(columns, target[:, columns] + correction, centroids, corner)
                errors[:, columns] = error = target[:, columns] - clustered
                remainder[:, :first] += error @ root[columns, group.start : columns.start]

    def _descend(self, slab: Slab, target: Tensor, centroids: Tensor, roots: Sequence[Tensor]) -> None:
        layout, hessian = self.layout, self.metric.require_hessian()
        current = slab.clustered(centroids)
        gradient = (target - current) @ hessian
        for group in layout.block_groups(self._lazy_columns):
            changes = torch.zeros_like(gradient[:, group])
            for columns in layout.blocks(group):
                root, first = roots[columns.start // layout.width], columns.start - group.start
                optimum = current[:, columns] + torch.cholesky_solve(gradient[:, columns].T, root).T
                clustered = slab.assign_block(columns, optimum, centroids, root)
                changes[:, first : first + layout.width] = change = current[:, columns] - clustered
                gradient[:, columns.stop : group.stop] += change @ hessian[columns, columns.stop : group.stop]
            gradient[:, group.stop :] += changes @ hessian[group, group.stop :]

    def _refit_scales(self, scales: Tensor, target: Tensor) -> None:
        centroids = self.centroids.expand()
        for slab in self._slabs():
            unscaled = slab.unscaled(centroids)
            image = self.metric.product(unscaled)
            square = (image * unscaled).sum(dim=1, keepdim=True)
            fitted = (image * target[slab.rows]).sum(dim=1, keepdim=True) / square
            usable = (square > 0) & torch.isfinite(fitted) & (fitted > 0)
            scales[slab.rows] = torch.where(usable, self._stored_scales(fitted), scales[slab.rows])

    def _refit_centroids(self, target: Tensor) -> Tensor:
        """Solve the normal equations for the centroids, with the labels and scales fixed.

        In the plain metric their matrix is diagonal, and one step is exact: each centroid is a mean. Otherwise the step
        is the first of a few steps of conjugate gradients, with the diagonal as preconditioner.
        """
        centroids, count = self.centroids.expand(), self.centroids.shape[0]
        residual, diagonal = torch.zeros_like(centroids), torch.zeros_like(centroids)
        hessian = self.metric.hessian
        squares = target.new_ones(self.layout.n) if hessian is None else hessian.diagonal()
        for slab in self._slabs():
            rows = target[slab.rows]
            residual += slab.sum_by_centroid(self.metric.product(rows - slab.clustered(centroids)), count)
            diagonal += slab.sum_by_centroid(squares.expand(rows.shape) * slab.scales, count)
        preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)
        if hessian is None:
            return centroids + preconditioner * residual
        return _conjugate_gradients(self._normal_product, centroids, residual, preconditioner)

    def _normal_product(self, centroids: Tensor) -> Tensor:
        """The matrix of the normal equations times `centroids` [codebooks * k, size]."""
        product, count = torch.zeros_like(centroids), len(centroids)
        for slab in self._slabs():
            product = product + slab.sum_by_centroid(self.metric.product(slab.clustered(centroids)), count)
        return product

    def _slabs(self) -> Iterator[Slab]:
        step, codebooks = self.layout.row_step, self.spec.codebooks
        k, weights = self.centroids.shape[0] // codebooks, self.metric.row_weights
        for rows in self.layout.slabs(codebooks, self._slab_weights):
            book = rows.start * codebooks // self.layout.m
            yield Slab(
                self.layout,
                rows,
                codebook=slice(book * k, (book + 1) * k),
                labels=self.labels[rows.start // step : -(-rows.stop // step)],
                scales=1.0 if self.scales is None else self.scales[rows],
                weights=1.0 if weights is None else weights[rows, None],
            )

    def _stored_scales(self, scales: Tensor) -> Tensor:
        return store_scales(scales, self.dtype).float()

    def _stored(self, centroids: Tensor) -> StoredValues:
        return store_values(centroids, self.spec.centroid_bits, self.dtype)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], start: Tensor, residual: Tensor, preconditioner: Tensor
) -> Tensor:
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952) from `start`, whose residual is `residual`."""
    solution, direction = start.clone(), preconditioner * residual
    decrease = _dot(residual, direction)
    for _ in range(CONJUGATE_STEPS):
        image = product(direction)
        curvature = _dot(direction, image)
        if decrease <= 0 or curvature <= 0:
            break
        solution += decrease / curvature * direction
        residual = residual - decrease / curvature * image
        preconditioned = preconditioner * residual
        decrease, previous = _dot(residual, preconditioned), decrease
        direction = preconditioned + decrease / previous * direction
    return solution


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The width×width blocks on the diagonal of an n×n matrix, [n / width, width, width]."""
    blocks = matrix.unfold(0, width, width).unfold(1, width, width).diagonal(dim1=0, dim2=1)
    return blocks.movedim(-1, 0).contiguous()


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
