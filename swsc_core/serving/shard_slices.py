"""Which rows and columns of a matrix of the checkpoint a tensor parallel rank holds, and in which order its rows are expected.

An engine's linear layer knows the rows of its own slices alone, of q, k and v separately. The checkpoint stores these as separate
matrices, concatenated in one matrix, or interleaved by head in one matrix, which the engine puts in order while it loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.compressed.compressed_matrix import Range
from swsc_core.storage.row_blocks import RowBlocks


@dataclass(frozen=True)
class LinearShard:
    """The shard of `rank`, of `ranks`, of a linear layer that has `width` inputs on each of them."""

    width: int
    rank: int
    ranks: int

    def different(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[int]:
        """How many different slices of each of `sizes` rows the matrix has: fewer than ranks where heads are repeated.

        Raises:
            ValueError: rows or columns that do not divide so.
        """
        (m, n), mine, others = shape, sum(sizes), sum(sizes[1:])
        if m == mine or len(sizes) == 1:
            several = [m // mine] * len(sizes)
        else:
            several = [self.ranks] + [(m - self.ranks * sizes[0]) // others] * (len(sizes) - 1)
        rows = sum(size * count for size, count in zip(sizes, several, strict=True))
        if rows != m or min(several) < 1 or n % self.width:
            wanted = f"slices of {'+'.join(map(str, sizes))} rows and {self.width} columns"
            raise ValueError(f"{name}: a matrix of {m}×{n} does not divide into {wanted}; use fewer ranks")
        return several

    def slices(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[tuple[Range, Range]]:
        """Rows and columns of the rank's slice of each of `sizes` rows; ValueError as from `different`."""
        several = self.different(name, sizes, shape)
        column = self.rank * (shape[1] // self.width) // self.ranks * self.width
        found, start = [], 0
        for size, count in zip(sizes, several, strict=True):
            first = start + self.rank * count // self.ranks * size
            found.append(((first, first + size), (column, column + self.width)))
            start += count * size
        return found

    def order(self, name: str, sizes: Sequence[int], shape: tuple[int, int], pieces: Mapping[str, RowBlocks]) -> Tensor:
        """The stored row, int64 [m], of each row that the layer is to have: q, k and v one after the other, if it splits so.

        Raises:
            ValueError: heads that are fused in another way than engines expect, q, k and v of a group side by side.
        """
        found = {(rows.count, rows.stride) for rows in pieces.values()}
        (count, stride), *more = found
        if len(sizes) == 1 or found == {(1, stride)} or all(rows.count == 1 for rows in pieces.values()):
            return torch.arange(shape[0])
        several = self.different(name, sizes, shape)
        lengths = [size * each // count for size, each in zip(sizes, several, strict=True)]
        expected = [RowBlocks(sum(lengths[:number]), length, stride, count) for number, length in enumerate(lengths)]
        if more or sum(lengths) != stride or stride * count != shape[0] or not set(pieces.values()) <= set(expected):
            raise ValueError(f"{name}: its heads are not fused as q, k and v by group; `swsc restore` first")
        return torch.cat([rows.index() for rows in expected])


@dataclass(frozen=True)
class EmbeddingShard:
    """The shard of an embedding or a head of which the rank holds rows `first` to `last`."""

    first: int
    last: int

    def slices(self, name: str, sizes: Sequence[int], shape: tuple[int, int]) -> list[tuple[Range, Range]]:
        """Rows and columns of the rank's slice."""
        return [((self.first, self.last), (0, shape[1]))]
