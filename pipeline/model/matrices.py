"""From a checkpoint's tensors to the matrices that are compressed: [outputs, inputs], one projection each.

Mostly a matrix is a tensor. A tensor that joins Q, K and V is taken apart by the geometry of its family, and one that lies
transposed (GPT-2's Conv1D) is turned round, so that "output channel" means the same in every model. A piece of X.weight is
called X.q.weight, X.k.weight, …; rows of no compressed piece stay behind as X.weight, whose shape then fits no loader that
does not know the format. A stack X [experts, …] is the joined matrix of all rows of all its matrices, X.0.weight, X.1.weight, … or,
where each joins two, X.0.gate.weight, X.0.up.weight, …
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.families import Family, Role
from pipeline.model.geometry import Geometry
from pipeline.model.model_config import text_config
from pipeline.model.stacks import is_stack
from pipeline.model.tensors import FLOATS, TensorInfo, View
from swsc_core.format import piece_name
from swsc_core.location import MatrixLocation
from swsc_core.row_blocks import RowBlocks, require_partition
from swsc_core.safetensors_header import BITS


@dataclass(frozen=True)
class Matrix:
    """A matrix of a checkpoint, and what it is for: one role or none."""

    info: TensorInfo
    role: str | None


@dataclass(frozen=True)
class Joined:
    """A tensor some of whose pieces are compressed: `view` shows the whole, turned round if it lies transposed."""

    tensor: str
    view: View
    pieces: tuple[TensorInfo, ...]

    @property
    def rows(self) -> list[RowBlocks]:
        """The rows of each piece."""
        return [rows for piece in self.pieces if piece.view and (rows := rows_of(piece.view))]

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n] of the joined matrix."""
        *stacked, a, b = self.view.tensor.shape
        m, n = (b, a) if self.view.transposed else (a, b)
        return m * math.prod(stacked), n

    @property
    def slices(self) -> list[View]:
        """What is read at a time: the whole, or one matrix of a stack after the other."""
        stacked = self.view.tensor.shape[:-2]
        return [replace(self.view, expert=number) for number in range(*stacked)] if stacked else [self.view]


def matrices_of(checkpoint: Checkpoint, family: Family, info: TensorInfo) -> list[Matrix]:
    """What a tensor consists of, in the order of its rows; itself, if it joins nothing.

    Raises:
        CheckpointError: its shape does not fit what config.json says of heads or experts.
    """
    role = family.role_of(info.name)
    if is_stack(info):
        return [found for number in range(info.shape[0]) for found in _of_expert(checkpoint, role, info, number)]
    if not is_matrix(info):
        return [Matrix(info, role.roles[0] if role.roles else None)]
    whole = _turned(info) if family.is_transposed(info.name) else info
    if role.geometry is None:
        return [Matrix(whole, role.roles[0] if role.roles else None)]
    pieces = zip(role.roles, _rows(checkpoint, whole, role.roles, role.geometry), strict=True)
    return [Matrix(_piece(whole, name, rows), name) for name, rows in pieces]


def _of_expert(checkpoint: Checkpoint, role: Role, info: TensorInfo, number: int) -> list[Matrix]:
    """One matrix of a stack, or what it joins. Of a stack that no family knows, matrices lie as they are read."""
    stack, own = role.stack, role.roles[0] if role.roles else None
    try:
        turned = stack is not None and stack.lies_turned(info.shape, text_config(checkpoint.config))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.store.root}: {info.name} is {list(info.shape)}, which is no stack of its experts: {error};"
            " download both again, or --exclude it"
        ) from None
    shape = info.shape[:0:-1] if turned else info.shape[1:]
    name, view = piece_name(info.name, str(number)), View(info, transposed=turned, expert=number)
    whole = replace(info, name=name, shape=shape, nbytes=info.nbytes // info.shape[0], view=view)
    if stack is None or not stack.roles:
        return [Matrix(whole, own)]
    pieces = zip(stack.roles, _rows(checkpoint, whole, stack.roles, stack.geometry), strict=True)
    return [Matrix(_piece(whole, piece, rows), own) for piece, rows in pieces]


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor can be compressed as it is."""
    bias = info.name.endswith("bias")  # those of joined experts have two dimensions
    return len(info.shape) == 2 and info.dtype in FLOATS and info.count > 0 and not bias


def find_matrix(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The matrix that has a name: that of a tensor, or of a piece of one."""
    family = Family(checkpoint.config)
    info, piece = _tensor_and_piece(checkpoint, name)
    if piece and is_stack(info):  # of hundreds of experts one
        found = _of_expert(checkpoint, family.role_of(info.name), info, int(piece.partition(".")[0]))
    else:
        found = matrices_of(checkpoint, family, info)
    return next((matrix.info for matrix in found if matrix.info.name == name), info)


def _tensor_and_piece(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, str]:
    """The tensor that a matrix is, or is a piece of, and the piece's own name ("" for the whole)."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name], ""
    words = name.removesuffix(".weight").split(".")
    stems = {".".join(words[:-own]): ".".join(words[-own:]) for own in (1, 2)}
    found = {tensor: piece for stem, piece in stems.items() for tensor in (f"{stem}.weight", stem)}
    return next((checkpoint.tensors[tensor], piece) for tensor, piece in found.items() if tensor in checkpoint.tensors)


def tensor_of(info: TensorInfo) -> str:
    """Name of the tensor that a matrix is, or is a piece of."""
    return info.view.tensor.name if info.view else info.name


def joined_of(compressed: Iterable[TensorInfo]) -> tuple[Joined, ...]:
    """The tensors that some of the matrices given are pieces of."""
    pieces: dict[tuple[str, View], list[TensorInfo]] = {}
    for info in compressed:
        if info.view and rows_of(info.view):
            pieces.setdefault((tensor_of(info), replace(info.view, rows=None, expert=None)), []).append(info)
    return tuple(Joined(*whole, tuple(own)) for whole, own in pieces.items())


def location_of(info: TensorInfo) -> MatrixLocation:
    """Where a matrix lies in the dense checkpoint."""
    if info.view is None:
        return MatrixLocation()
    if (rows := rows_of(info.view)) is None:
        return MatrixLocation(transposed=info.view.transposed)
    experts = None if info.view.expert is None else info.view.tensor.shape[0]
    return MatrixLocation(tensor_of(info), info.view.transposed, rows, experts)


def rows_of(view: View) -> RowBlocks | None:
    """Which rows of the joined matrix a view shows, of a stack those of one matrix or of a piece of it; None: all."""
    if view.expert is None:
        return view.rows
    m = view.tensor.shape[2 if view.transposed else 1]
    own = view.rows or RowBlocks(0, m, m, 1)
    return replace(own, first=own.first + view.expert * m)


def _turned(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.shape[::-1], view=View(info, transposed=True))


def _piece(whole: TensorInfo, name: str, rows: RowBlocks) -> TensorInfo:
    shape = (rows.total, whole.shape[1])
    made = whole.view and (whole.view.transposed or whole.view.expert is not None)
    view = replace(whole.view, rows=rows) if whole.view and made else View(whole, rows=rows)
    nbytes = shape[0] * shape[1] * BITS[whole.dtype] // 8
    return replace(whole, name=piece_name(whole.name, name), shape=shape, nbytes=nbytes, view=view)


def _rows(checkpoint: Checkpoint, whole: TensorInfo, roles: tuple[str, ...], geometry: Geometry) -> list[RowBlocks]:
    """The rows of each piece of a joined matrix."""
    where, m = checkpoint.store.root, whole.shape[0]
    try:
        count, lengths = geometry(text_config(checkpoint.config), m)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: config.json does not say how {whole.name} is joined ({error!r})") from None
    group = sum(lengths)
    found = [RowBlocks(sum(lengths[:place]), length, group, count) for place, length in enumerate(lengths)]
    try:
        require_partition(0, found)
        fits = group * count == m
    except ValueError:
        fits = False
    if not fits:
        raise CheckpointError(
            f"{where}: {whole.name} has {m} rows, but by config.json {'+'.join(roles)} take {count} times"
            f" {'+'.join(map(str, lengths))}; download both again, or --exclude it"
        )
    return found
