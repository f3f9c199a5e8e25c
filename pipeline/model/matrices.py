"""From a checkpoint's tensors to the matrices that are compressed: [outputs, inputs], one projection each.

Mostly a matrix is a tensor. A tensor that joins Q, K and V is taken apart by the geometry of its family, and one that lies
transposed (GPT-2's Conv1D) is turned round, so that "output channel" means the same in every model. A piece of X.weight is
called X.q.weight, X.k.weight, …; rows of no compressed piece stay behind as X.weight, whose shape then fits no loader that
does not know the format.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.families import Family, Role
from pipeline.model.tensors import DTYPES, FLOATS, TensorInfo, View
from swsc_core.pieces import Rows, misfit


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
    def rows(self) -> list[Rows]:
        """The rows of each piece."""
        return [piece.view.rows for piece in self.pieces if piece.view and piece.view.rows]


def matrices_of(checkpoint: Checkpoint, family: Family, info: TensorInfo) -> list[Matrix]:
    """What a tensor consists of, in the order of its rows; itself, if it joins nothing.

    Raises:
        CheckpointError: its shape does not fit what config.json says of heads.
    """
    role = family.role_of(info.name)
    if not is_matrix(info):
        return [Matrix(info, role.roles[0] if role.roles else None)]
    whole = _turned(info) if family.is_transposed(info.name) else info
    if role.geometry is None:
        return [Matrix(whole, role.roles[0] if role.roles else None)]
    pieces = zip(role.roles, _rows(checkpoint, whole, role), strict=True)
    return [Matrix(_piece(whole, name, rows), name) for name, rows in pieces]


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor can be compressed."""
    bias = info.name.endswith("bias")  # those of joined experts have two dimensions
    return len(info.shape) == 2 and info.dtype in FLOATS and info.count > 0 and not bias


def find_matrix(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The matrix that has a name: that of a tensor, or of a piece of one."""
    tensor = name if name in checkpoint.tensors else f"{name.rsplit('.', 2)[0]}.weight"
    found = matrices_of(checkpoint, Family(checkpoint.config), checkpoint.tensors[tensor])
    return next((matrix.info for matrix in found if matrix.info.name == name), checkpoint.tensors[tensor])


def tensor_of(info: TensorInfo) -> str:
    """Name of the tensor that a matrix is, or is a piece of."""
    return info.view.tensor.name if info.view else info.name


def joined_of(compressed: Iterable[TensorInfo]) -> tuple[Joined, ...]:
    """The tensors that some of the matrices given are pieces of."""
    pieces: dict[tuple[str, View], list[TensorInfo]] = {}
    for info in compressed:
        if info.view and info.view.rows:
            pieces.setdefault((tensor_of(info), replace(info.view, rows=None)), []).append(info)
    return tuple(Joined(*whole, tuple(own)) for whole, own in pieces.items())


def lies_as(info: TensorInfo) -> dict[str, Any]:
    """What an entry of a compressed matrix says of the tensor that it stands for; nothing if it is that itself."""
    if info.view is None:
        return {}
    about: dict[str, Any] = {"transposed": True} if info.view.transposed else {}
    rows = info.view.rows
    if rows is None:
        return about
    return about | {"tensor": tensor_of(info), "rows": [rows.first, rows.length, rows.stride, rows.count]}


def _turned(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.shape[::-1], view=View(info, transposed=True))


def _piece(whole: TensorInfo, name: str, rows: Rows) -> TensorInfo:
    shape = (rows.total, whole.shape[1])
    view = replace(whole.view, rows=rows) if whole.view and whole.view.transposed else View(whole, rows=rows)
    nbytes = shape[0] * shape[1] * DTYPES[whole.dtype][1]
    stem = whole.name.removesuffix(".weight")
    return replace(whole, name=f"{stem}.{name}.weight", shape=shape, nbytes=nbytes, view=view)


def _rows(checkpoint: Checkpoint, whole: TensorInfo, role: Role) -> list[Rows]:
    """The rows of each piece of a joined matrix."""
    assert role.geometry is not None
    where, m = checkpoint.store.root, whole.shape[0]
    config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    try:
        count, lengths = role.geometry(config, m)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: config.json does not say how {whole.name} is joined ({error!r})") from None
    group = sum(lengths)
    found = [Rows(sum(lengths[:place]), length, group, count) for place, length in enumerate(lengths)]
    if group * count != m or misfit(0, found):
        raise CheckpointError(
            f"{where}: {whole.name} has {m} rows, but by config.json {'+'.join(role.roles)} take {count} times"
            f" {'+'.join(map(str, lengths))}; download both again, or --exclude it"
        )
    return found
