"""A compressed matrix as it is stored, and the ways back: all of it, some of its rows, slabs of rows one after the other.

W_New = W' + (U_r Σ^½)(Σ^½ V_r), section III-C of the paper: what the labels say, plus what the factors say. Labels lie in rows
(the grid of layout.py) and packed without gaps, so eight rows of them fill whole bytes: rows are read in eights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.method.segmentation import Layout
from swsc_core.method.stored_values import StoredValues
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import unpack, unpack_eights

_EIGHT = 8  # rows of labels whose bits fill whole bytes, whatever the width of a label


@dataclass(frozen=True)
class SwscMatrix:
    """A compressed m×n matrix, as it is stored.

    Attributes:
        layout: how it is cut into segments; segments of size n ("output") or m ("input") are whole channels.
        codebooks: row groups with a codebook each; labels count within the codebook of their rows.
        centroids: [codebooks * k, layout.size], the representative vectors.
        labels: uint8 [packed_bytes(layout.count, ceil(log2 k))], the label vector, in the order of `layout.segments`.
        scales: [m] or None; row i of the matrix is scales[i] times what its labels say.
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
        """Centroids of a codebook."""
        return self.centroids.shape[0] // self.codebooks

    @property
    def shares_whole_channels(self) -> bool:
        """The paper's form: a label a channel, one codebook."""
        layout = self.layout
        return self.codebooks == 1 and layout.size == (layout.n if layout.channel_axis == "output" else layout.m)

    def indices(self, first: int = 0, last: int | None = None) -> Tensor:
        """Row of `centroids` of each segment: int32 [rows of the grid, blocks], rows `first` to `last` (`first` a multiple of 8)."""
        rows, blocks = self.layout.grid
        last = rows if last is None else last
        bits = label_bits(self.n_clusters)
        start, count = first * blocks * bits // 8, (last - first) * blocks
        packed = self.labels[start : start + (count * bits + 7) // 8]
        return unpack(packed, bits, count).reshape(-1, blocks) + self._first_centroids(
            torch.arange(first, last, device=packed.device)
        )

    def _first_centroids(self, rows: Tensor) -> Tensor:
        """Where the codebook of each row of the grid begins, int32 [rows, 1]."""
        rows_a_book = self.layout.grid[0] // self.codebooks
        return (rows // rows_a_book * self.n_clusters).to(torch.int32)[:, None]

    def require_labels(self) -> None:
        """Raise ValueError if a label is no number of a centroid: what is stored was damaged."""
        bits = label_bits(self.n_clusters)
        if self.n_clusters == 1 << bits or not self.labels.numel():
            return
        largest = int(unpack(self.labels, bits, self.layout.count).max())
        if largest >= self.n_clusters:
            raise ValueError(f"label {largest} is out of range for {self.n_clusters} centroids")

    def slabs(self, values: int) -> Iterator[Tensor]:
        """`indices` of slabs of about `values` weights, in the order of the rows."""
        rows = self.layout.grid[0]
        size = max(1, values // (_EIGHT * self.layout.row_step * self.layout.n)) * _EIGHT
        for first in range(0, rows, size):
            yield self.indices(first, min(first + size, rows))


# dtypes of the size of a whole row of centroids, in bytes
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table [k, s] by their numbers, int32 [count]: [count, s].

    A short row is moved as one number: ten times as fast as `table[rows]` on a CPU.
    """
    word = _WORDS.get(table.shape[1] * table.element_size())
    if table.requires_grad and table.is_cuda:  # the gradient of `index_select` is a sum in random order there
        return torch.nn.functional.embedding(rows, table)
    if word is None or table.requires_grad:
        return table.index_select(0, rows)
    table = table.clone(memory_format=torch.contiguous_format)  # small, and a slice may begin between two words
    return table.view(word).reshape(-1).index_select(0, rows).view(table.dtype).reshape(len(rows), -1)


def restore(matrix: SwscMatrix, dtype: torch.dtype) -> Tensor:
    """W_New = W' + leftᵀ · right, [m, n], computed in float32 and rounded to `dtype`."""
    layout = matrix.layout
    if matrix.n_clusters:
        dense = layout.matrix(take_rows(matrix.centroids.expand(), matrix.indices().reshape(-1))).contiguous()
    else:
        dense = torch.zeros(layout.m, layout.n, device=matrix.centroids.data.device)
    if matrix.scales is not None:
        dense *= matrix.scales.float()[:, None]
    if matrix.left.shape[0]:
        dense += matrix.left.expand().T @ matrix.right.expand()
    return dense.to(dtype)


def restore_rows(matrix: SwscMatrix, rows: Tensor) -> Tensor:
    """Rows of W_New, float32 [count, n], by their numbers, int64 [count]; only their labels are unpacked."""
    layout = matrix.layout
    dense = _shared_rows(matrix, rows) if matrix.n_clusters else torch.zeros(len(rows), layout.n, device=rows.device)
    if matrix.scales is not None:
        dense = dense * matrix.scales.float()[rows, None]
    if matrix.left.shape[0]:
        dense = dense + matrix.left.expand()[:, rows].T @ matrix.right.expand()
    return dense


def _shared_rows(matrix: SwscMatrix, rows: Tensor) -> Tensor:
    layout, bits = matrix.layout, label_bits(matrix.n_clusters)
    blocks, grid_rows = layout.grid[1], rows // layout.row_step
    eights = -(-layout.grid[0] // _EIGHT)
    missing = eights * blocks * bits - matrix.labels.numel()
    packed = torch.nn.functional.pad(matrix.labels, (0, missing)).reshape(eights, -1)[grid_rows // _EIGHT]
    own: Tensor | int = 0
    if bits:
        labels = unpack_eights(packed.reshape(-1, blocks, bits)).reshape(-1, _EIGHT, blocks)
        own = labels[torch.arange(len(rows), device=rows.device), grid_rows % _EIGHT]
    first = matrix._first_centroids(grid_rows).expand(-1, blocks)
    found = matrix.centroids.expand()[own + first]  # [count, blocks, size]
    if layout.channel_axis == "output":
        return found.reshape(len(rows), -1)
    return found.gather(2, (rows % layout.row_step)[:, None, None].expand(-1, blocks, 1))[:, :, 0]
