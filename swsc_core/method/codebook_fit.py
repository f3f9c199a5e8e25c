"""CodebookFit in any metric: labels, codebook and scales of one matrix, each improved while the others stand.

Lloyd's two steps, taken in the metric of the error (metric.py):

* `assign` takes blocks of columns from the last to the first and feeds the error of each into those not yet done, as GPTQ (Frantar et al.
  2022) and GPTVQ (van Baalen et al. 2024) do; updates of far columns wait and are made by one GEMM;
* `reassign` visits the blocks again, each with the labels of all the others standing: coordinate descent;
* `refit` solves for scales and centroids by least squares.

In the plain metric with whole channels this is Lloyd's algorithm as the paper uses it. Rows do not depend on each other
once the codebook stands, so they are worked through in slabs, and memory does not grow with the matrix.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from swsc_core.method.codebook import nearest, sample_size, weighted_kmeans
from swsc_core.method.metric import Metric
from swsc_core.method.pairwise import sum_by_label
from swsc_core.method.segmentation import GPU_SLAB_WEIGHTS, slab_values
from swsc_core.method.spec import SwscSpec
from swsc_core.method.stored_values import StoredValues, store_scales, store_values

_LAZY_COLUMNS = 128  # columns after which the rest of a slab is updated
CONJUGATE_STEPS = 4  # a later round goes on where this one stopped: twelve gave the same energies (docs/experiments.md)


class CodebookFit:
    """Labels, codebooks and scales of one matrix.

    Attributes:
        target: float32 [m, n], what is to be approximated; not changed here, and may be replaced between steps.
        centroids: as stored, [codebooks * k, size]: equal numbers of rows share each codebook.
        labels: int32 `layout.grid`, counted within the codebook of their rows.
        scales: float32 [m, 1] as stored, or None: rows are compared as they are.
    """

    def __init__(self, target: Tensor, metric: Metric, spec: SwscSpec, dtype: torch.dtype) -> None:
        self.target, self.metric, self.spec, self.dtype = target, metric, spec, dtype
        self.layout = spec.layout((target.shape[0], target.shape[1]))
        self.labels = torch.zeros(self.layout.grid, dtype=torch.int32, device=target.device)
        rms = target.square().mean(dim=1, keepdim=True).sqrt()
        self.scales = self._stored_scales(rms) if spec.scaled else None
        self.centroids = store_values(target.new_zeros(0, self.layout.size), None, dtype)

    def adopt(self, labels: Tensor, centroids: Tensor) -> None:
        """Begin from a clustering of the unscaled segments: labels int64 [count], float32 centroids [k, size]."""
        self.labels = labels.reshape(self.layout.grid).int()
        self.centroids = self._stored(centroids)

    def start(self, generator: torch.Generator) -> None:
        """Learn first codebooks from a sample of the segments."""
        books = [self._first_codebook(rows, generator) for rows in self._book_rows()]
        self.centroids = self._stored(torch.cat(books))

    def _first_codebook(self, book: slice, generator: torch.Generator) -> Tensor:
        weights, layout = self.metric.column_weights, self.layout
        first, count = (rows * layout.n // layout.size for rows in (book.start, book.stop - book.start))
        wanted = sample_size(self.spec.n_clusters)
        chosen = torch.arange(count) if count <= wanted else torch.randint(count, (wanted,), generator=generator)
        rows, columns = layout.places(chosen.sort().values.to(self.target.device) + first)
        points = self.target[rows, columns]
        weight = torch.ones_like(points) if weights is None else weights[columns]
        if self.scales is not None:
            points, weight = points / self.scales[rows, 0], weight * self.scales[rows, 0].square()
        if self.metric.row_weights is not None:
            weight = weight * self.metric.row_weights[rows]
        return weighted_kmeans(points, weight, self.spec.n_clusters, generator)

    def snapshot(self) -> tuple[Tensor, StoredValues, Tensor | None]:
        """Labels, centroids and scales, to be put back by `put_back` if what follows does not help."""
        return self.labels.clone(), self.centroids, None if self.scales is None else self.scales.clone()

    def put_back(self, state: tuple[Tensor, StoredValues, Tensor | None]) -> None:
        self.labels, self.centroids, self.scales = state

    def assign(self, *, feedback: bool) -> None:
        """Assign every segment, from the last column on; with `feedback` the error of each goes into the columns before it."""
        centroids, moment, width = self.centroids.expand(), self.metric.hessian, self.layout.width
        if moment is None:
            roots = None
        else:
            roots = (
                _diagonal_blocks(self.metric.root, width)
                if feedback
                else self.metric.factor(_diagonal_blocks(moment, width))
            )
        for rows in self._slabs():
            if feedback and roots is not None:
                self._feed_slab(rows, centroids, roots)
            else:
                self._assign_slab(rows, self.target[rows], centroids, roots)

    def _assign_slab(self, rows: slice, wanted: Tensor, centroids: Tensor, roots: Tensor | None) -> None:
        for block, own in enumerate(self._blocks()):
            self._assign(wanted[:, own], rows, own, centroids, None if roots is None else roots[block])

    def _feed_slab(self, rows: slice, centroids: Tensor, roots: Tensor) -> None:
        target, root = self.target[rows], self.metric.root
        errors = torch.zeros_like(target)
        for start, stop in reversed(list(self._lazy_blocks())):
            owed = errors[:, stop:] @ root[stop:, start:stop]  # what later columns left in these of E L
            for own in reversed(list(self._blocks(start, stop))):
                corner = roots[own.start // self.layout.width]
                repaid = torch.linalg.solve_triangular(
                    corner, owed[:, own.start - start : own.stop - start], upper=False, left=False
                )
                choice = self._assign(target[:, own] + repaid, rows, own, centroids, corner)
                errors[:, own] = error = target[:, own] - choice
                owed[:, : own.start - start] += error @ root[own, start : own.start]

    def reassign(self) -> int:
        """Assign every segment again while all others stand; returns how many changed. The energy does not grow."""
        before, centroids, moment = self.labels.clone(), self.centroids.expand(), self.metric.hessian
        roots = None if moment is None else self.metric.factor(_diagonal_blocks(moment, self.layout.width))
        for rows in self._slabs():
            if moment is None or roots is None:  # blocks do not see each other
                self._assign_slab(rows, self.target[rows], centroids, None)
            else:
                self._descend_slab(rows, centroids, moment, roots)
        return int((before != self.labels).sum())

    def _descend_slab(self, rows: slice, centroids: Tensor, moment: Tensor, roots: Tensor) -> None:
        current = self._slab(rows, centroids)
        gradient = (self.target[rows] - current) @ moment
        for start, stop in self._lazy_blocks():
            changes = torch.zeros_like(gradient[:, start:stop])
            for own in self._blocks(start, stop):
                root = roots[own.start // self.layout.width]
                wanted = current[:, own] + torch.cholesky_solve(gradient[:, own].T, root).T
                choice = self._assign(wanted, rows, own, centroids, root)
                changes[:, own.start - start : own.stop - start] = change = current[:, own] - choice
                gradient[:, own.stop : stop] += change @ moment[own, own.stop : stop]
            gradient[:, stop:] += changes @ moment[start:stop, stop:]

    def refit(self) -> None:
        """Least squares for the scales, then for the centroids, in the metric of the error."""
        if self.scales is not None:
            self._refit_scales(self.centroids.expand())
        self.centroids = self._stored(self._refit_centroids(self.centroids.expand()))

    def _refit_scales(self, centroids: Tensor) -> None:
        assert self.scales is not None
        for rows in self._slabs():
            shape = self._spread(rows, centroids)
            image = self.metric.product(shape)
            square = (image * shape).sum(dim=1, keepdim=True)
            fitted = (image * self.target[rows]).sum(dim=1, keepdim=True) / square
            usable = (square > 0) & torch.isfinite(fitted) & (fitted > 0)
            self.scales[rows] = torch.where(usable, self._stored_scales(fitted), self.scales[rows])

    def _refit_centroids(self, centroids: Tensor) -> Tensor:
        """Preconditioned conjugate gradients on the normal equations; exact in one step in the plain metric."""
        residual, diagonal = torch.zeros_like(centroids), torch.zeros_like(centroids)
        for rows in self._slabs():
            residual += self._gather(rows, self.metric.product(self.target[rows] - self._slab(rows, centroids)))
            diagonal += self._gather(rows, self._diagonal(rows))
        preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)
        direction = preconditioner * residual
        if self.metric.hessian is None:
            return centroids + direction
        centroids, step_from = centroids.clone(), direction
        fit = _dot(residual, direction)
        for _ in range(CONJUGATE_STEPS):
            image = self._normal(step_from)
            curvature = _dot(step_from, image)
            if fit <= 0 or curvature <= 0:
                break
            centroids += fit / curvature * step_from
            residual = residual - fit / curvature * image
            direction = preconditioner * residual
            fit, before = _dot(residual, direction), fit
            step_from = direction + fit / before * step_from
        return centroids

    def _diagonal(self, rows: slice) -> Tensor:
        """What the square of each weight of some rows costs, times the row's scale: [rows, n]."""
        shape = self.target[rows].shape
        if self.metric.hessian is None:
            ones = self.target.new_ones(shape)
        else:
            ones = self.metric.hessian.diagonal().expand(shape)
        return ones if self.scales is None else ones * self.scales[rows]

    def _normal(self, centroids: Tensor) -> Tensor:
        """The normal equations' matrix times a change of the codebook."""
        parts = (self._gather(rows, self.metric.product(self._slab(rows, centroids))) for rows in self._slabs())
        return sum(parts, torch.zeros_like(centroids))

    def _gather(self, rows: slice, image: Tensor) -> Tensor:
        """Sums [codebooks * k, size] over the segments of each label, of an image [rows, n] of an error."""
        segments = self.layout.segments(image * self._row_factor(rows, 1))
        return sum_by_label(segments, self._places(rows), self.centroids.shape[0])

    def weighted_error(self) -> float:
        """Of what the stored parts leave of the target."""
        centroids = self.centroids.expand()
        errors = ((rows.start, self.target[rows] - self._slab(rows, centroids)) for rows in self._slabs())
        return math.fsum(self.metric.weighted_error(error, first) for first, error in errors)

    def restored(self) -> Tensor:
        """What the stored parts stand for, [m, n]."""
        centroids, dense = self.centroids.expand(), torch.empty_like(self.target)
        for rows in self._slabs():
            dense[rows] = self._slab(rows, centroids)
        return dense

    def _assign(
        self, wanted: Tensor, rows: slice, columns: slice, centroids: Tensor, transform: Tensor | None
    ) -> Tensor:
        """Label one block of columns by what is wanted there; returns what it then holds, [rows, width].

        `transform` [width, width] makes plain distances of the metric's; for one column it is a factor without effect.
        """
        layout, centroids = self.layout, centroids[self._book(rows)]
        points = (wanted if self.scales is None else wanted / self.scales[rows]).reshape(-1, layout.size)
        if layout.channel_axis == "output":
            seen = (points, centroids) if transform is None else (points @ transform, centroids @ transform)
            labels = nearest(*seen)
        else:
            factor = self._row_factor(rows, 2)
            weights = factor.reshape(-1, layout.size) if isinstance(factor, Tensor) else None
            labels = nearest(points, centroids, weights)
        self._labels(rows)[:, columns.start // layout.width] = labels
        return centroids[labels].reshape(wanted.shape) * (1.0 if self.scales is None else self.scales[rows])

    def _slab(self, rows: slice, centroids: Tensor) -> Tensor:
        """What some rows of the matrix are with these centroids."""
        spread = self._spread(rows, centroids)
        return spread if self.scales is None else spread * self.scales[rows]

    def _spread(self, rows: slice, centroids: Tensor) -> Tensor:
        return self.layout.matrix(centroids[self._places(rows)])

    def _places(self, rows: slice) -> Tensor:
        """Index of the centroid of each segment of some rows, int64 [segments]."""
        return self._labels(rows).reshape(-1).long() + self._book(rows).start

    def _labels(self, rows: slice) -> Tensor:
        step = self.layout.row_step
        return self.labels[rows.start // step : -(-rows.stop // step)]

    def unscaled(self, rows: slice) -> Tensor:
        """Some rows of the target, each divided by its scale."""
        return self.target[rows] if self.scales is None else self.target[rows] / self.scales[rows]

    def _row_factor(self, rows: slice, power: int) -> Tensor | float:
        """Weight of each row times its scale to `power`, as a column; one if there are neither."""
        weights = self.metric.weights_of(rows)
        if self.scales is None:
            return 1.0 if weights is None else weights
        scales = self.scales[rows] ** power
        return scales if weights is None else weights * scales

    def _stored_scales(self, scales: Tensor) -> Tensor:
        return store_scales(scales, self.dtype).float()

    def _stored(self, centroids: Tensor) -> StoredValues:
        return store_values(centroids, self.spec.centroid_bits, self.dtype)

    def _book(self, rows: slice) -> slice:
        """Where the codebook of some rows lies among the centroids."""
        k = self.centroids.shape[0] // self.spec.codebooks
        book = rows.start * self.spec.codebooks // self.layout.m
        return slice(book * k, (book + 1) * k)

    def _book_rows(self) -> Iterator[slice]:
        height = self.layout.m // self.spec.codebooks
        return (slice(start, start + height) for start in range(0, self.layout.m, height))

    def _slabs(self) -> Iterator[slice]:
        """Blocks of rows of one codebook each, of bounded size."""
        step = self.layout.row_step
        values = GPU_SLAB_WEIGHTS if self.target.is_cuda else slab_values(self.target.numel())
        height = max(1, values // self.layout.n // step) * step
        for book in self._book_rows():
            yield from (slice(start, min(book.stop, start + height)) for start in range(book.start, book.stop, height))

    def _blocks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        width, end = self.layout.width, self.layout.n if stop is None else stop
        return (slice(column, column + width) for column in range(start, end, width))

    def _lazy_blocks(self) -> Iterator[tuple[int, int]]:
        width = max(1, _LAZY_COLUMNS // self.layout.width) * self.layout.width
        return ((start, min(self.layout.n, start + width)) for start in range(0, self.layout.n, width))


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The width×width blocks on the diagonal of an n×n matrix, [n / width, width, width]."""
    blocks = (
        matrix.unfold(0, width, width).unfold(1, width, width).diagonal(dim1=0, dim2=1)
    )  # a view [width, width, n / width]
    return blocks.movedim(-1, 0).contiguous()


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
