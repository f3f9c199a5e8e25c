"""Rows and columns of a stored matrix that a tensor parallel rank holds, and the row order that the engine expects.

An engine's linear layer knows only the rows of its own slices, separately for q, k and v. The checkpoint stores these
as separate matrices, concatenated in one matrix, or interleaved by head in one matrix that the engine reorders while
loading.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix, Range
from swsc_core.compressed.registry import matrix_of
from swsc_core.storage.row_blocks import RowBlocks


@dataclass(frozen=True)
class RankSlices:
    """A rank's slices of one or several matrices, stacked by rows.

    Attributes:
        matrices: the slices, compressed or dense.
        order: int64 [rows]; output row i is row order[i] of the stacked slices. None if the rows are in order.
    """

    matrices: Sequence[CompressedMatrix | Tensor]
    order: Tensor | None = None


@dataclass(frozen=True)
class LinearShard:
    """A rank's share of a linear layer.

    Attributes:
        width: input features of the layer on each rank.
        rank: number of this rank.
        ranks: number of ranks.
    """

    width: int
    rank: int
    ranks: int

    def slice_counts(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[int]:
        """How many different slices of each size the matrix has; fewer than ranks where key-value heads are repeated.

        Args:
            name: name of the matrix, for error messages.
            sizes: rows of the rank's slice of each of the matrices that the layer fuses.
            shape: [m, n] of the stored matrix.

        Raises:
            ValueError: the matrix does not divide into such slices.
        """
        (m, n), rank_rows, rows_after_first = shape, sum(sizes), sum(sizes[1:])
        if m == rank_rows or len(sizes) == 1:
            counts = [m // rank_rows] * len(sizes)
        else:
            counts = [self.ranks] + [(m - self.ranks * sizes[0]) // rows_after_first] * (len(sizes) - 1)
        total = sum(size * count for size, count in zip(sizes, counts, strict=True))
        if total != m or min(counts) < 1 or n % self.width:
            slices = f"slices of {'+'.join(map(str, sizes))} rows and {self.width} columns"
            raise ValueError(f"{name}: a matrix of {m}×{n} does not divide into {slices}; use fewer ranks")
        return counts

    def slices(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[tuple[Range, Range]]:
        """Rows and columns of the rank's slice of each size; arguments and errors are those of `slice_counts`."""
        counts = self.slice_counts(name, sizes, shape)
        column = self.rank * (shape[1] // self.width) // self.ranks * self.width
        slices, start = [], 0
        for size, count in zip(sizes, counts, strict=True):
            first = start + self.rank * count // self.ranks * size
            slices.append(((first, first + size), (column, column + self.width)))
            start += count * size
        return slices

    def row_order(
        self, name: str, sizes: Sequence[int], shape: tuple[int, int], pieces: Mapping[str, RowBlocks]
    ) -> Tensor:
        """The stored row, int64 [m], of each row of the engine's layer, which has q, k and v one after the other.

        Args:
            name: name of the matrix, for error messages.
            sizes: rows of the rank's slice of each of the matrices that the layer fuses.
            shape: [m, n] of the stored matrix.
            pieces: rows of each compressed piece in the stored matrix.

        Raises:
            ValueError: the heads are not interleaved as engines expect, with q, k and v of a group side by side.
        """
        layouts = {(rows.count, rows.stride) for rows in pieces.values()}
        (count, stride), *other_layouts = layouts
        if len(sizes) == 1 or layouts == {(1, stride)} or all(rows.count == 1 for rows in pieces.values()):
            return torch.arange(shape[0])
        counts = self.slice_counts(name, sizes, shape)
        lengths = [size * slices // count for size, slices in zip(sizes, counts, strict=True)]
        expected = [RowBlocks(sum(lengths[:number]), length, stride, count) for number, length in enumerate(lengths)]
        is_partition = sum(lengths) == stride and stride * count == shape[0]
        if other_layouts or not is_partition or not set(pieces.values()) <= set(expected):
            raise ValueError(f"{name}: its heads are not fused as q, k and v by group; `swsc restore` first")
        return torch.cat([rows.index() for rows in expected])


@dataclass(frozen=True)
class EmbeddingShard:
    """A rank's share of an embedding or a head: rows `first` to `last`, `last` excluded."""

    first: int
    last: int

    def slices(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[tuple[Range, Range]]:
        """Rows and columns of the rank's only slice."""
        return [((self.first, self.last), (0, shape[1]))]


def slice_matrix(name: str, matrix: CompressedMatrix, rows: Range, columns: Range) -> CompressedMatrix:
    """A slice of a compressed matrix, with copies of its parts, because views would keep the whole matrix in memory.

    Raises:
        ValueError: the slice cannot be stored; names the matrix.
    """
    try:
        part = matrix.slice(rows, columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; use fewer ranks, or `swsc restore` first") from error
    return matrix_of({key: tensor.clone() for key, tensor in part.tensors.items()}, part.entry)
