"""Which rows of a joined matrix a piece is: Q of a matrix that holds Q, K and V.

Families that join their projections lay them out one after the other, or interleave them head by head or group by group.
All of these are blocks of equal length at equal distances, so a piece is four numbers, whatever the number of heads.

A stack of matrices (one for each expert) is such a joined matrix, too: that of all their rows, one matrix after the other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """`count` blocks of `length` rows, `stride` apart, from row `first` on."""

    first: int
    length: int
    stride: int
    count: int

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.length * self.count

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First row of each block, and the first after it."""
        return [(start, start + self.length) for start in self.starts().tolist()]

    def starts(self, device: torch.device | str = "cpu") -> Tensor:
        """First row of each block, int64 [count]."""
        return self.first + self.stride * torch.arange(self.count, device=device)

    def index(self, device: torch.device | str = "cpu") -> Tensor:
        """The rows, int64 [total], in the order of the piece."""
        return (self.starts(device)[:, None] + torch.arange(self.length, device=device)).reshape(-1)

    def take(self, matrix: Tensor) -> Tensor:
        """The piece [total, n] of a joined matrix [m, n]: a copy."""
        return matrix[self.index(matrix.device)]

    def put(self, matrix: Tensor, piece: Tensor) -> None:
        """Write a piece [total, n] into its rows of the joined matrix [m, n], in place."""
        matrix[self.index(matrix.device)] = piece.to(matrix.device, matrix.dtype)


def rest_of(rows: int, pieces: Sequence[Rows]) -> Tensor:
    """The rows, int64 [rest], in order, of a joined matrix of so many rows that are in no piece."""
    free = torch.ones(rows, dtype=torch.bool)
    for piece in pieces:
        free[piece.index()] = False
    return free.nonzero()[:, 0]


def order_of(rows: int, pieces: list[Rows]) -> list[int]:
    """Where each of so many rows of a joined matrix is to be found among those of the pieces, one after the other, and the rest."""
    taken = [row for piece in pieces for start, stop in piece.blocks for row in range(start, stop)]
    own = set(taken)
    found = {row: place for place, row in enumerate([*taken, *(row for row in range(rows) if row not in own)])}
    return [found[row] for row in range(rows)]


def laid(matrix: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A matrix [outputs, inputs] as its tensor lies in a dense checkpoint, by what its entry says; of several stacked [k·m, n] all."""
    if count := entry.get("stacked"):
        matrix = matrix.reshape(count, -1, matrix.shape[1])
    return matrix.transpose(-2, -1).contiguous() if entry.get("transposed") else matrix


def join(rest: Tensor, places: Sequence[Rows], pieces: Iterable[Tensor]) -> Tensor:
    """The joined matrix [m, n] of its pieces and of the rows [rest, n] that are in none of them; in the dtype of `rest`.

    Args:
        places: the rows of each piece.
        pieces: [rows, n] each, in the same order, one at a time.

    Raises:
        ValueError: pieces that overlap or leave rows out.
    """
    if wrong := misfit(len(rest), places):
        raise ValueError(wrong)
    matrix = rest.new_empty((len(rest) + sum(rows.total for rows in places), rest.shape[1]))
    matrix[rest_of(len(matrix), places).to(rest.device)] = rest
    for rows, piece in zip(places, pieces, strict=True):
        rows.put(matrix, piece)
    return matrix


def misfit(rest: int, pieces: Sequence[Rows]) -> str:
    """What is wrong with pieces that, with `rest` rows more, are to make up a whole matrix; "" if nothing is."""
    if any(min(rows.length, rows.stride, rows.count) < 1 or rows.first < 0 for rows in pieces):
        return "a piece has no rows"
    whole = rest + sum(rows.total for rows in pieces)
    none = torch.zeros(0, dtype=torch.int64, device="cpu")  # models are made where another device is the default
    starts = torch.cat([none, *(rows.starts() for rows in pieces)])
    stops = torch.cat([none, *(rows.starts() + rows.length for rows in pieces)])
    starts, order = starts.sort()
    stops = torch.cat([starts.new_zeros(1), stops[order]])
    if bool((starts < stops[:-1]).any()) or int(stops[-1]) > whole:
        return f"pieces overlap or leave the {whole} rows of the joined matrix"
    return ""
