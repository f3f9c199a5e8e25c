"""A rank's slices of a fused matrix some pieces of which are compressed.

Wherever an engine splits by heads, the rows of one piece that a rank holds are consecutive rows of that piece. Each
piece is therefore sliced like any matrix, and the outputs of the slices are put into the order that the rank expects.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix, Range
from swsc_core.serving.shard_slices import LinearShard, RankSlices, slice_matrix
from swsc_core.storage.location import row_blocks_of
from swsc_core.storage.row_blocks import remaining_rows, require_partition


class FusedMatrix:
    """A fused matrix [m, n] of a checkpoint.

    Args:
        name: name of the tensor, for error messages.
        pieces: name of a piece ("q", "k", …) -> compressed matrix.
        remaining: [rows that belong to no piece, n], dense.

    Raises:
        ValueError: the pieces and the remaining rows do not make up a matrix.
    """

    def __init__(self, name: str, pieces: Mapping[str, CompressedMatrix], remaining: Tensor) -> None:
        self.name, self.pieces, self.remaining = name, pieces, remaining
        locations = [matrix.entry.location for matrix in pieces.values()]
        self.row_blocks = dict(zip(pieces, row_blocks_of(locations), strict=True))
        self._require_matrix()
        total = sum(rows.total for rows in self.row_blocks.values())
        self.shape = (len(remaining) + total, remaining.shape[1])

    def _require_matrix(self) -> None:
        remaining, row_blocks = self.remaining, self.row_blocks
        if remaining.ndim != 2 or not remaining.is_floating_point():
            raise ValueError(
                f"{self.name}: {list(remaining.shape)} are no rows of a fused matrix; `swsc verify DIR` names the file"
            )
        for piece, rows in row_blocks.items():
            if (shape := self.pieces[piece].entry.shape) != (rows.total, remaining.shape[1]):
                raise ValueError(
                    f"{self.name}.{piece}: {list(shape)}, expected {[rows.total, remaining.shape[1]]};"
                    " `swsc verify DIR` names the file"
                )
        try:
            require_partition(len(remaining), list(row_blocks.values()))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; compress again") from None

    def slice(self, sizes: Sequence[int], shard: LinearShard) -> RankSlices:
        """The rank's slices of all pieces and of the remaining rows.

        Args:
            sizes: rows of the rank's slice of each of the matrices that the engine's layer fuses.
            shard: the rank's share of the layer.

        Raises:
            ValueError: the matrix does not divide by ranks, or the rank's rows of a piece are not consecutive.
        """
        stored_rows, columns = self._rank_rows(sizes, shard)
        matrices: list[CompressedMatrix | Tensor] = []
        order, total = torch.empty_like(stored_rows), 0
        for piece, rows in self.row_blocks.items():
            is_in_piece, numbers = self._positions(stored_rows, rows.index())
            if len(numbers):
                name = f"{self.name}.{piece}"
                first, last = _consecutive_range(name, numbers)
                matrices.append(slice_matrix(name, self.pieces[piece], (first, last), columns))
                order[is_in_piece] = total + numbers - first
                total += len(numbers)
        remaining = remaining_rows(self.shape[0], list(self.row_blocks.values()))
        is_remaining, numbers = self._positions(stored_rows, remaining)
        if len(numbers):
            matrices.append(self.remaining[numbers.to(self.remaining.device), slice(*columns)].clone())
            order[is_remaining] = torch.arange(total, total + len(numbers))
        return RankSlices(matrices, None if torch.equal(order, torch.arange(len(order))) else order)

    def _rank_rows(self, sizes: Sequence[int], shard: LinearShard) -> tuple[Tensor, Range]:
        """The stored rows, int64 [rows of the rank], in the order that the engine expects, and the rank's columns."""
        order = shard.row_order(self.name, sizes, self.shape, self.row_blocks)
        slices = shard.slices(self.name, sizes, self.shape)
        return torch.cat([order[slice(*rows)] for rows, _ in slices]), slices[0][1]

    def _positions(self, stored_rows: Tensor, piece_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `stored_rows` are among `piece_rows`, bool, and the positions of these within `piece_rows`."""
        position = torch.full((self.shape[0],), -1)
        position[piece_rows] = torch.arange(len(piece_rows))
        positions = position[stored_rows]
        return positions >= 0, positions[positions >= 0]


def _consecutive_range(name: str, numbers: Tensor) -> Range:
    first, last = int(numbers.min()), int(numbers.max()) + 1
    if last - first != len(numbers):
        raise ValueError(
            f"{name}: a rank would take {len(numbers)} rows scattered over {first} to {last}; use fewer ranks"
        )
    return first, last
