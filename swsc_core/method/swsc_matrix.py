"""A compressed matrix as it is stored, and its restoration: the whole matrix, some of its rows, or slab by slab.

W_New = W′ + (U_r Σ^½)(Σ^½ V_r), section III-C of the paper. Labels are stored row by row (the grid of segmentation.py)
and packed without gaps. Eight rows of labels fill whole bytes, so rows are read in groups of eight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.method.segmentation import Layout
from swsc_core.method.stored_values import StoredValues
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import unpack, unpack_eights

# Rows of labels whose bits fill whole bytes, for any width of a label.
_EIGHT = 8


@dataclass(frozen=True)
class SwscMatrix:
    """A compressed m×n matrix, as it is stored.

    Attributes:
        layout: segmentation; segments of size n ("output") or m ("input") are whole channels.
        codebooks: groups of rows with a codebook each; labels count within the codebook of their rows.
        centroids: [codebooks * k, layout.size], the representative vectors.
        labels: uint8 [packed_bytes(layout.count, ceil(log2 k))], the label vector, in the order of `layout.segments`.
        scales: [m] or None; row i of W′ is scales[i] times the centroids of its labels.
        left, right: [r, m] and [r, n]: (U_r Σ^½)ᵀ and Σ^½ V_r of the error.
    """

    layout: Layout
    codebooks: int
    centroids: StoredValues
    labels: Tensor
    scales: Tensor | None
    left: StoredValues
    right: StoredValues

    @property
    def n_clusters(self) -> int:
        """Centroids per codebook, k."""
        return self.centroids.shape[0] // self.codebooks

    @property
    def shares_whole_channels(self) -> bool:
        """Whether this is the paper's form: one label per channel, one codebook."""
        layout = self.layout
        return self.codebooks == 1 and layout.size == (layout.n if layout.channel_axis == "output" else layout.m)

    def indices(self, first: int = 0, last: int | None = None) -> Tensor:
        """Row of `centroids` of each segment, int32 [rows, blocks].

        Args:
            first: first row of the grid, a multiple of 8.
            last: the row of the grid after the last; None: the end of the grid.
        """
        rows, blocks = self.layout.grid
        last = rows if last is None else last
        bits = label_bits(self.n_clusters)
        start, count = first * blocks * bits // 8, (last - first) * blocks
        packed = self.labels[start : start + (count * bits + 7) // 8]
        grid_rows = torch.arange(first, last, device=packed.device)
        return unpack(packed, bits, count).reshape(-1, blocks) + self._first_centroids(grid_rows)

    def _first_centroids(self, grid_rows: Tensor) -> Tensor:
        """Row of `centroids` where the codebook of each row of the grid begins, int32 [rows, 1]."""
        rows_per_codebook = self.layout.grid[0] // self.codebooks
        return (grid_rows // rows_per_codebook * self.n_clusters).to(torch.int32)[:, None]

    def require_labels(self) -> None:
        """Raise ValueError if a label names no centroid, which means that the stored labels are damaged."""
        bits = label_bits(self.n_clusters)
        if self.n_clusters == 1 << bits or not self.labels.numel():
            return
        largest = int(unpack(self.labels, bits, self.layout.count).max())
        if largest >= self.n_clusters:
            raise ValueError(
                f"label {largest} is out of range for {self.n_clusters} centroids: the file is damaged; write it again"
            )

    def slabs(self, values: int) -> Iterator[Tensor]:
        """`indices` of slabs of about `values` weights, in row order."""
        rows = self.layout.grid[0]
        size = max(1, values // (_EIGHT * self.layout.row_step * self.layout.n)) * _EIGHT
        for first in range(0, rows, size):
            yield self.indices(first, min(first + size, rows))


# Bytes of a row of a table -> a dtype of that size.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table [k, s] by their indices, int32 [count]: [count, s].

    A short row is copied as one number, which is ten times as fast as `table[rows]` on a CPU.
    """
    word = _WORDS.get(table.shape[1] * table.element_size())
    if table.requires_grad and table.is_cuda:
        # The gradient of `index_select` has no fixed order of summation there.
        return torch.nn.functional.embedding(rows, table)
    if word is None or table.requires_grad:
        return table.index_select(0, rows)
    # The table is small. A slice of another tensor may begin between two words, a copy does not.
    table = table.clone(memory_format=torch.contiguous_format)
    return table.view(word).reshape(-1).index_select(0, rows).view(table.dtype).reshape(len(rows), -1)


def restore(matrix: SwscMatrix, dtype: torch.dtype) -> Tensor:
    """W_New = W′ + leftᵀ · right, [m, n], computed in float32 and rounded to `dtype` (paper, section III-C)."""
    layout = matrix.layout
    if matrix.n_clusters:
        restored = layout.matrix(take_rows(matrix.centroids.expand(), matrix.indices().reshape(-1))).contiguous()
    else:
        restored = torch.zeros(layout.m, layout.n, device=matrix.centroids.data.device)
    if matrix.scales is not None:
        restored *= matrix.scales.float()[:, None]
    if matrix.left.shape[0]:
        restored += matrix.left.expand().T @ matrix.right.expand()
    return restored.to(dtype)


def restore_rows(matrix: SwscMatrix, rows: Tensor) -> Tensor:
    """Rows of W_New by their indices, int64 [count]: float32 [count, n]. Only the labels of these rows are unpacked."""
    layout = matrix.layout
    if matrix.n_clusters:
        restored = _unscaled_rows(matrix, rows)
    else:
        restored = torch.zeros(len(rows), layout.n, device=rows.device)
    if matrix.scales is not None:
        restored = restored * matrix.scales.float()[rows, None]
    if matrix.left.shape[0]:
        restored = restored + matrix.left.expand()[:, rows].T @ matrix.right.expand()
    return restored


def _unscaled_rows(matrix: SwscMatrix, rows: Tensor) -> Tensor:
    """Rows of W′ before they are scaled, [count, n]."""
    layout = matrix.layout
    blocks, grid_rows = layout.grid[1], rows // layout.row_step
    indices = _labels_of_rows(matrix, grid_rows) + matrix._first_centroids(grid_rows).expand(-1, blocks)
    segments = matrix.centroids.expand()[indices]  # [count, blocks, size]
    if layout.channel_axis == "output":
        return segments.reshape(len(rows), -1)
    return segments.gather(2, (rows % layout.row_step)[:, None, None].expand(-1, blocks, 1))[:, :, 0]


def _labels_of_rows(matrix: SwscMatrix, grid_rows: Tensor) -> Tensor | int:
    """Labels of some rows of the grid, int32 [count, blocks]; 0 if a codebook has one centroid and labels no bits."""
    layout, bits = matrix.layout, label_bits(matrix.n_clusters)
    if not bits:
        return 0
    blocks, eights = layout.grid[1], -(-layout.grid[0] // _EIGHT)
    missing = eights * blocks * bits - matrix.labels.numel()
    packed = torch.nn.functional.pad(matrix.labels, (0, missing)).reshape(eights, -1)[grid_rows // _EIGHT]
    labels = unpack_eights(packed.reshape(-1, blocks, bits)).reshape(-1, _EIGHT, blocks)
    return labels[torch.arange(len(grid_rows), device=grid_rows.device), grid_rows % _EIGHT]
