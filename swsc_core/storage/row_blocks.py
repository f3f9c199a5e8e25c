"""Rows of a fused matrix that belong to one of its pieces, such as Q in a matrix of Q, K and V.

Families that fuse their projections concatenate them, or interleave them by head or by group of heads. Each of these
layouts consists of blocks of equal length at equal distances, so that four numbers describe a piece for any number of
heads.

A stack of matrices (one per expert) is treated as a fused matrix of all their rows, one matrix after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowBlocks:
    """`count` blocks of `length` rows at distances of `stride` rows, the first of which starts at row `first`."""

    first: int
    length: int
    stride: int
    count: int

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.length * self.count

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.first + self.stride * (self.count - 1) + self.length

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First row of each block, and the row after its last."""
        return [(start, start + self.length) for start in self.starts().tolist()]

    def shifted(self, rows: int) -> "RowBlocks":
        """The same blocks, `rows` rows further down."""
        return replace(self, first=self.first + rows)

    def starts(self, device: torch.device | str = "cpu") -> Tensor:
        """First row of each block, int64 [count]."""
        return self.first + self.stride * torch.arange(self.count, device=device)

    def index(self, device: torch.device | str = "cpu") -> Tensor:
        """The rows, int64 [total], in the order of the piece."""
        return (self.starts(device)[:, None] + torch.arange(self.length, device=device)).reshape(-1)

    def take(self, matrix: Tensor) -> Tensor:
        """Copy of the piece [total, n] of a fused matrix [m, n]."""
        return matrix[self.index(matrix.device)]

    def put(self, matrix: Tensor, piece: Tensor) -> None:
        """Write a piece [total, n] into its rows of the fused matrix [m, n], in place."""
        matrix[self.index(matrix.device)] = piece.to(matrix.device, matrix.dtype)


def remaining_rows(m: int, pieces: Sequence[RowBlocks]) -> Tensor:
    """Rows of a fused matrix of `m` rows that belong to none of `pieces`, int64 [remaining], in ascending order."""
    is_remaining = torch.ones(m, dtype=torch.bool)
    for piece in pieces:
        is_remaining[piece.index()] = False
    return is_remaining.nonzero()[:, 0]


def row_permutation(m: int, pieces: Sequence[RowBlocks]) -> list[int]:
    """Permutation [m] that restores the fused matrix's row order from `concat(pieces, remaining_rows)`."""
    piece_rows = [row for piece in pieces for start, stop in piece.blocks for row in range(start, stop)]
    in_pieces = set(piece_rows)
    concatenated = [*piece_rows, *(row for row in range(m) if row not in in_pieces)]
    position = {row: index for index, row in enumerate(concatenated)}
    return [position[row] for row in range(m)]


def fuse_rows(remaining: Tensor, row_blocks: Sequence[RowBlocks], pieces: Iterable[Tensor]) -> Tensor:
    """The fused matrix [m, n], in the dtype of `remaining`.

    Args:
        remaining: the rows of no piece, [remaining, n].
        row_blocks: the rows of each piece.
        pieces: [rows, n] each, in the same order; consumed one at a time.

    Raises:
        ValueError: pieces that overlap or leave rows out.
    """
    require_partition(len(remaining), row_blocks)
    matrix = remaining.new_empty((len(remaining) + sum(rows.total for rows in row_blocks), remaining.shape[1]))
    matrix[remaining_rows(len(matrix), row_blocks).to(remaining.device)] = remaining
    for rows, piece in zip(row_blocks, pieces, strict=True):
        rows.put(matrix, piece)
    return matrix


def require_partition(remaining: int, pieces: Sequence[RowBlocks]) -> None:
    """Raise ValueError unless `pieces` and `remaining` further rows cover each row of a matrix exactly once."""
    if any(min(rows.length, rows.stride, rows.count) < 1 or rows.first < 0 for rows in pieces):
        raise ValueError("a piece of the fused matrix has no rows")
    m = remaining + sum(rows.total for rows in pieces)
    # Models are created while another device, such as meta, is the default.
    empty = torch.zeros(0, dtype=torch.int64, device="cpu")
    starts = torch.cat([empty, *(rows.starts() for rows in pieces)])
    stops = torch.cat([empty, *(rows.starts() + rows.length for rows in pieces)])
    starts, order = starts.sort()
    stops = torch.cat([starts.new_zeros(1), stops[order]])
    if bool((starts < stops[:-1]).any()) or int(stops[-1]) > m:
        raise ValueError(f"pieces overlap or exceed the {m} rows of the fused matrix")


def apply_view(tensor: Tensor, transposed: bool = False, row_blocks: RowBlocks | None = None) -> Tensor:
    """A matrix [outputs, inputs] from the tensor that holds it.

    Args:
        tensor: [m, n], or [n, m] if `transposed`.
        transposed: the tensor holds [inputs, outputs].
        row_blocks: the rows of the matrix among those of the tensor; None: all.
    """
    matrix = tensor.T.contiguous() if transposed else tensor
    return row_blocks.take(matrix) if row_blocks else matrix
