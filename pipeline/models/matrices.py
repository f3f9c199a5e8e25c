"""The matrices of a checkpoint's tensors: [outputs, inputs], one projection each.

Usually a matrix is a whole tensor. A tensor that fuses Q, K and V is split by the layout of its family, and a tensor
that is stored transposed (Conv1D of GPT-2) is transposed back, so that "output channel" means the same in every model.

The pieces of X.weight are named X.q.weight, X.k.weight, … Rows of pieces that are not compressed remain as X.weight,
whose shape then fits no loader that does not know the format. A stack X [experts, …] is treated as one fused matrix
with the rows of all its matrices X.0.weight, X.1.weight, … If each expert fuses two matrices, they are X.0.gate.weight,
X.0.up.weight, …
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.architectures.families import Family, Role
from pipeline.architectures.fused_layouts import FusedLayout
from pipeline.architectures.model_config import text_config
from pipeline.architectures.stacked_experts import is_stack
from pipeline.architectures.tensor_info import FLOAT_DTYPES, TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo, expert_matrix, whole_matrix
from pipeline.errors import CheckpointError
from swsc_core.storage.row_blocks import RowBlocks, require_partition


@dataclass(frozen=True)
class FusedTensor:
    """A fused tensor with matrices that are compressed separately. The rows of its other matrices remain in it.

    Attributes:
        tensor: the tensor in the source.
        matrices: its compressed matrices.
    """

    tensor: TensorInfo
    matrices: tuple[MatrixInfo, ...]

    @property
    def row_blocks(self) -> list[RowBlocks]:
        """The rows of each compressed matrix within the fused matrix [m, n]."""
        return [rows for matrix in self.matrices if (rows := matrix.location.row_blocks)]

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n] of the fused matrix. The fused matrix of a stack has the rows of all experts."""
        *experts, a, b = self.tensor.shape
        m, n = (b, a) if self.matrices[0].location.transposed else (a, b)
        return m * math.prod(experts), n

    @property
    def fused_matrices(self) -> list[MatrixInfo]:
        """The matrices that are read at a time: the fused matrix, or the matrix of each expert."""
        transposed = self.matrices[0].location.transposed
        if self.matrices[0].expert is None:
            return [whole_matrix(self.tensor, transposed)]
        return [expert_matrix(self.tensor, number, transposed) for number in range(self.tensor.shape[0])]


def matrices_of(checkpoint: Checkpoint, family: Family, info: TensorInfo) -> list[MatrixInfo]:
    """Return the matrices of a tensor, in the order of its rows; an empty list if it is neither a matrix nor a stack.

    Raises:
        CheckpointError: its shape does not fit the heads or experts in config.json.
    """
    role = family.role_of(info.name)
    if is_stack(info):
        experts = range(info.shape[0])
        return [matrix for number in experts for matrix in _matrices_of_expert(checkpoint, role, info, number)]
    if not is_matrix(info):
        return []
    matrix = whole_matrix(info, family.is_transposed(info.name), role.roles[0] if role.roles else None)
    if role.layout is None:
        return [matrix]
    pieces = zip(role.roles, _row_blocks(checkpoint, matrix, role.roles, role.layout), strict=True)
    return [matrix.piece(name, rows, name) for name, rows in pieces]


def _matrices_of_expert(checkpoint: Checkpoint, role: Role, info: TensorInfo, number: int) -> list[MatrixInfo]:
    """The matrix of an expert, or the matrices that it fuses. A stack of an unknown family counts as not transposed."""
    stack, stack_role = role.stack, role.roles[0] if role.roles else None
    try:
        transposed = stack is not None and stack.is_transposed(info.shape, text_config(checkpoint.config))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.store.root}: {info.name} has shape {list(info.shape)}, which does not fit the experts in"
            f" config.json ({error}); download both again, or --exclude it"
        ) from None
    matrix = expert_matrix(info, number, transposed, stack_role)
    if stack is None or not stack.roles:
        return [matrix]
    pieces = zip(stack.roles, _row_blocks(checkpoint, matrix, stack.roles, stack.layout), strict=True)
    return [matrix.piece(name, rows, stack_role) for name, rows in pieces]


def is_matrix(info: TensorInfo) -> bool:
    """Return whether a tensor can be compressed as one matrix, or as pieces of one."""
    # Biases of fused experts have two dimensions.
    bias = info.name.endswith("bias")
    return len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and info.count > 0 and not bias


def find_matrix(checkpoint: Checkpoint, name: str) -> MatrixInfo:
    """Return the matrix with a name: a whole tensor, or a piece of one.

    Raises:
        CheckpointError: the checkpoint has no such matrix.
    """
    family = Family(checkpoint.config)
    info, piece = _tensor_and_piece(checkpoint, name)
    # Building the matrices of one expert is enough, because a stack may hold hundreds.
    if piece and is_stack(info):
        candidates = _matrices_of_expert(checkpoint, family.role_of(info.name), info, int(piece.partition(".")[0]))
    else:
        candidates = matrices_of(checkpoint, family, info)
    matrix = next((matrix for matrix in candidates if matrix.name == name), None)
    if matrix is None:
        raise CheckpointError(
            f"{checkpoint.store.root}: the checkpoint has no matrix {name}; `swsc plan` lists its matrices"
        )
    return matrix


def _tensor_and_piece(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, str]:
    """The tensor that holds a matrix, and the name of the piece ("" for a whole tensor)."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name], ""
    words = name.removesuffix(".weight").split(".")
    stems = {".".join(words[:-count]): ".".join(words[-count:]) for count in (1, 2)}
    candidates = {tensor: piece for stem, piece in stems.items() for tensor in (f"{stem}.weight", stem)}
    return next(
        (checkpoint.tensors[tensor], piece) for tensor, piece in candidates.items() if tensor in checkpoint.tensors
    )


def fused_tensors(matrices: Iterable[MatrixInfo]) -> tuple[FusedTensor, ...]:
    """Return the fused tensors to which the given matrices belong."""
    pieces: dict[str, list[MatrixInfo]] = {}
    for matrix in matrices:
        if matrix.location.row_blocks is not None:
            pieces.setdefault(matrix.tensor.name, []).append(matrix)
    return tuple(FusedTensor(group[0].tensor, tuple(group)) for group in pieces.values())


def _row_blocks(
    checkpoint: Checkpoint, fused: MatrixInfo, roles: tuple[str, ...], layout: FusedLayout
) -> list[RowBlocks]:
    """The rows of each piece of a fused matrix."""
    root, m = checkpoint.store.root, fused.shape[0]
    try:
        count, lengths = layout(text_config(checkpoint.config), m)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{root}: config.json does not define how {fused.name} is fused ({error!r})") from None
    group = sum(lengths)
    pieces = [RowBlocks(sum(lengths[:number]), length, group, count) for number, length in enumerate(lengths)]
    if group * count != m or not _is_partition(pieces):
        raise CheckpointError(
            f"{root}: {fused.name} has {m} rows, but by config.json {'+'.join(roles)} take {count} times"
            f" {'+'.join(map(str, lengths))}; download both again, or --exclude it"
        )
    return pieces


def _is_partition(pieces: list[RowBlocks]) -> bool:
    try:
        require_partition(0, pieces)
    except ValueError:
        return False
    return True
