"""How a matrix is cut into segments, and into the slabs of rows and blocks of columns that are processed at a time.

A channel of `length` weights is cut into length / size segments; with size = length a segment is a whole channel, as in
the paper (section III-B). Columns are processed block by block, from the last to the first, because the columns to the
left of a block compensate its error. A block is `size` columns for output channels (one segment per row) and one column
for input channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.method.pairwise import sum_by_label
from swsc_core.method.weighted_kmeans import nearest
from swsc_core.storage.bits import ChannelAxis

# Weights of a slab of rows on a CPU, at least and at most, and the number of slabs from which slabs grow.
_LEAST_SLAB, _LARGEST_SLAB, _SLABS = 1 << 19, 1 << 21, 16
# Weights of a slab on a GPU, where the number of blocks determines the time. It never depends on free memory, because
# the order of summation, and with it the last bit, depends on it.
GPU_SLAB_WEIGHTS = 1 << 28


@dataclass(frozen=True)
class Layout:
    """Segments of `size` weights along the channels of `channel_axis` of an m×n matrix."""

    m: int
    n: int
    channel_axis: ChannelAxis
    size: int

    @property
    def count(self) -> int:
        """Number of segments."""
        return self.m * self.n // self.size

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.size if self.channel_axis == "output" else 1

    @property
    def row_step(self) -> int:
        """Rows that a segment spans; slabs and row groups are multiples of it."""
        return 1 if self.channel_axis == "output" else self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of the labels: rows of segments, blocks of columns."""
        return self.m // self.row_step, self.n // self.width

    def segments(self, rows: Tensor) -> Tensor:
        """[rows, n] -> [segments, size], in the order of the labels; the number of rows is a multiple of `row_step`."""
        if self.channel_axis == "output":
            return rows.reshape(-1, self.size)
        return rows.reshape(-1, self.size, self.n).transpose(1, 2).reshape(-1, self.size)

    def matrix(self, segments: Tensor) -> Tensor:
        """Inverse of `segments`."""
        if self.channel_axis == "output":
            return segments.reshape(-1, self.n)
        return segments.reshape(-1, self.n, self.size).transpose(1, 2).reshape(-1, self.n)

    def weight_indices(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64 [count, size] each, of the weights of segments, given by index, int64 [count]."""
        along = torch.arange(self.size, device=segments.device)
        if self.channel_axis == "output":
            blocks = self.n // self.size
            rows, columns = segments // blocks, segments % blocks * self.size
            return rows[:, None].expand(-1, self.size), columns[:, None] + along
        rows, columns = segments // self.n * self.size, segments % self.n
        return rows[:, None] + along, columns[:, None].expand(-1, self.size)

    def row_groups(self, codebooks: int) -> Iterator[slice]:
        """The rows that each of `codebooks` codebooks serves."""
        height = self.m // codebooks
        return (slice(start, start + height) for start in range(0, self.m, height))

    def slabs(self, codebooks: int, weights: int) -> Iterator[slice]:
        """Rows in slabs of about `weights` weights; the rows of a slab share a codebook."""
        height = max(1, weights // self.n // self.row_step) * self.row_step
        for group in self.row_groups(codebooks):
            for start in range(group.start, group.stop, height):
                yield slice(start, min(group.stop, start + height))

    def blocks(self, columns: slice | None = None) -> Iterator[slice]:
        """The blocks of columns within `columns`, a multiple of whole blocks; None: of the whole matrix."""
        start, stop = (0, self.n) if columns is None else (columns.start, columns.stop)
        return (slice(column, column + self.width) for column in range(start, stop, self.width))

    def block_groups(self, columns: int) -> Iterator[slice]:
        """All columns in groups of whole blocks, about `columns` columns each."""
        width = max(1, columns // self.width) * self.width
        return (slice(start, min(self.n, start + width)) for start in range(0, self.n, width))


@dataclass(frozen=True)
class Slab:
    """Rows of a matrix that share a codebook and are processed together.

    Attributes:
        layout: segmentation of the whole matrix.
        rows: the rows within the matrix.
        codebook: rows of the centroids [codebooks * k, size] that are the codebook of these rows.
        labels: int32 [rows of the grid, blocks], counted within the codebook; a view, which `assign_block` writes.
        scales: float32 [rows, 1], or 1.0 for rows without scales.
        weights: float32 [rows, 1], the diagonal of D, or 1.0 for D = I.
    """

    layout: Layout
    rows: slice
    codebook: slice
    labels: Tensor
    scales: Tensor | float
    weights: Tensor | float

    def unscaled(self, centroids: Tensor) -> Tensor:
        """The centroid of each segment, [rows, n], before rows are scaled."""
        return self.layout.matrix(centroids[self._centroid_indices()])

    def clustered(self, centroids: Tensor) -> Tensor:
        """These rows of W′, [rows, n]."""
        return self.unscaled(centroids) * self.scales

    def sum_by_centroid(self, image: Tensor, count: int) -> Tensor:
        """Sums [count, size] of an image [rows, n] of an error over the segments of each of `count` centroids."""
        segments = self.layout.segments(image * (self.weights * self.scales))
        return sum_by_label(segments, self._centroid_indices(), count)

    def assign_block(self, columns: slice, target: Tensor, centroids: Tensor, transform: Tensor | None) -> Tensor:
        """Label each segment of one block of columns by its nearest centroid.

        Args:
            columns: the block.
            target: [rows, width], what the block should be.
            centroids: of all codebooks.
            transform: [width, width], after which plain distances are those of the metric; None: they already are.

        Returns:
            The block of W′, [rows, width].
        """
        codebook = centroids[self.codebook]
        labels = self._nearest((target / self.scales).reshape(-1, self.layout.size), codebook, transform)
        self.labels[:, columns.start // self.layout.width] = labels
        return codebook[labels].reshape(target.shape) * self.scales

    def _nearest(self, points: Tensor, codebook: Tensor, transform: Tensor | None) -> Tensor:
        if self.layout.channel_axis == "input":
            # A block is one column, whose transform is one factor for all points: it changes no label.
            weights = self.weights * self.scales**2
            return nearest(points, codebook, weights.reshape(points.shape) if isinstance(weights, Tensor) else None)
        if transform is None:
            return nearest(points, codebook)
        return nearest(points @ transform, codebook @ transform)

    def _centroid_indices(self) -> Tensor:
        """Row of the centroids of each segment, int64 [segments]."""
        first_centroid: int = self.codebook.start
        return self.labels.reshape(-1).long() + first_centroid


def slab_values(count: int) -> int:
    """Weights of a slab of rows, on a CPU, of a matrix of `count` weights.

    About five temporaries of a slab's size exist at a time. Together they take less than half of the memory of a large
    matrix; a small matrix is one slab.
    """
    return min(_LARGEST_SLAB, max(_LEAST_SLAB, count // _SLABS))
