"""A rank's slices of a fused matrix, parts of which are compressed: of each part, and of the rows that belong to none.

The rank holds certain rows of the fused matrix. Those of one part are consecutive rows of it wherever an engine splits by heads,
so a part is sliced as any matrix is; the outputs of the slices are then put into the order that the rank expects.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix, Range
from swsc_core.compressed.entry import Entry
from swsc_core.serving.shard_slices import LinearShard
from swsc_core.storage.location import row_blocks_of
from swsc_core.storage.row_blocks import RowBlocks, remaining_rows, require_partition

Cuts = tuple[
    list[CompressedMatrix | Tensor], Tensor | None
]  # slices, and which of their rows each output is if not in order


def slice_fused(
    name: str, sizes: tuple[int, ...], entries: Mapping[str, Entry], rest: Tensor, shard: LinearShard,
    cut: Callable[[str, Range, Range], CompressedMatrix],
) -> Cuts:  # fmt: skip
    """The rank's slices of the matrix that fuses the parts of `entries` and `rest` [rows that belong to none, n].

    Args:
        cut: gives rows and columns of a part by its name.

    Raises:
        ValueError: parts that do not make up a matrix; rows of a rank that are scattered over a part.
    """
    pieces = dict(zip(entries, row_blocks_of(entry.location for entry in entries.values()), strict=True))
    shape = _shape(name, entries, pieces, rest)
    order, slices = shard.order(name, sizes, shape, pieces), shard.slices(name, sizes, shape)
    wanted, columns = torch.cat([order[slice(*rows)] for rows, _ in slices]), slices[0][1]
    cuts: list[CompressedMatrix | Tensor] = []
    found, before = torch.empty_like(wanted), 0
    for piece, rows in pieces.items():
        here, own = _own(wanted, rows.index(), shape[0])
        if len(own):
            first, last = _consecutive(f"{name}.{piece}", own)
            cuts.append(cut(piece, (first, last), columns))
            found[here] = before + own - first
            before += len(own)
    here, own = _own(wanted, remaining_rows(shape[0], list(pieces.values())), shape[0])
    if len(own):
        cuts.append(rest[own.to(rest.device), slice(*columns)].clone())
        found[here] = torch.arange(before, before + len(own))
    return cuts, None if torch.equal(found, torch.arange(len(found))) else found


def _shape(name: str, entries: Mapping[str, Entry], pieces: Mapping[str, RowBlocks], rest: Tensor) -> tuple[int, int]:
    if rest.ndim != 2 or not rest.is_floating_point():
        raise ValueError(f"{name}: {list(rest.shape)} are no rows of a fused matrix; `swsc verify DIR` names the file")
    for piece, rows in pieces.items():
        if (shape := entries[piece].shape) != (rows.total, rest.shape[1]):
            raise ValueError(f"{name}.{piece}: {list(shape)}, but it takes {rows.total}×{rest.shape[1]}")
    try:
        require_partition(len(rest), list(pieces.values()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; compress again") from None
    return len(rest) + sum(rows.total for rows in pieces.values()), rest.shape[1]


def _own(wanted: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Which of the wanted rows are among `rows`, bool, and which of these each of them is."""
    number = torch.full((m,), -1)
    number[rows] = torch.arange(len(rows))
    found = number[wanted]
    return found >= 0, found[found >= 0]


def _consecutive(name: str, own: Tensor) -> tuple[int, int]:
    first, last = int(own.min()), int(own.max()) + 1
    if last - first != len(own):
        raise ValueError(f"{name}: a rank would take {len(own)} rows scattered over {first} to {last}; use fewer ranks")
    return first, last
