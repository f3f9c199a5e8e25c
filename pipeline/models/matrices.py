"""From a checkpoint's tensors to the matrices that are compressed: [outputs, inputs], one projection each.

Usually a matrix is a tensor. A tensor that fuses Q, K and V is split by the layout of its family, and one that is stored transposed
(GPT-2's Conv1D) is transposed back, so that "output channel" means the same in every model. A part of X.weight is called X.q.weight,
X.k.weight, …; rows of no compressed part remain as X.weight, whose shape then fits no loader that does not know the format. A stack
X [experts, …] is the fused matrix of all rows of all its matrices, X.0.weight, X.1.weight, … or, where each of them fuses two,
X.0.gate.weight, X.0.up.weight, …
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
    """A tensor some of whose matrices are compressed one by one; the rows of all others remain in it.

    Attributes:
        tensor: in the source.
        matrices: the compressed ones.
    """

    tensor: TensorInfo
    matrices: tuple[MatrixInfo, ...]

    @property
    def row_blocks(self) -> list[RowBlocks]:
        """The rows of each matrix among those of the fused matrix [m, n]."""
        return [rows for matrix in self.matrices if (rows := matrix.location.row_blocks)]

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n] of the fused matrix; of a stack it has the rows of all its matrices."""
        *experts, a, b = self.tensor.shape
        m, n = (b, a) if self.matrices[0].location.transposed else (a, b)
        return m * math.prod(experts), n

    @property
    def fused_matrices(self) -> list[MatrixInfo]:
        """What is read at once: the fused matrix, or that of each expert."""
        transposed = self.matrices[0].location.transposed
        if self.matrices[0].expert is None:
            return [whole_matrix(self.tensor, transposed)]
        return [expert_matrix(self.tensor, number, transposed) for number in range(self.tensor.shape[0])]


def matrices_of(checkpoint: Checkpoint, family: Family, info: TensorInfo) -> list[MatrixInfo]:
    """The matrices that a tensor consists of, in the order of its rows; none if it is neither a matrix nor a stack.

    Raises:
        CheckpointError: its shape does not fit what config.json says of heads or experts.
    """
    role = family.role_of(info.name)
    if is_stack(info):
        return [found for number in range(info.shape[0]) for found in _of_expert(checkpoint, role, info, number)]
    if not is_matrix(info):
        return []
    whole = whole_matrix(info, family.is_transposed(info.name), role.roles[0] if role.roles else None)
    if role.layout is None:
        return [whole]
    parts = zip(role.roles, _rows(checkpoint, whole, role.roles, role.layout), strict=True)
    return [whole.part(name, rows, name) for name, rows in parts]


def _of_expert(checkpoint: Checkpoint, role: Role, info: TensorInfo, number: int) -> list[MatrixInfo]:
    """The matrix of an expert, or those that it fuses. A stack that no family knows is not transposed."""
    stack, of_all = role.stack, role.roles[0] if role.roles else None
    try:
        transposed = stack is not None and stack.is_transposed(info.shape, text_config(checkpoint.config))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.store.root}: {info.name} is {list(info.shape)}, which is no stack of its experts: {error};"
            " download both again, or --exclude it"
        ) from None
    whole = expert_matrix(info, number, transposed, of_all)
    if stack is None or not stack.roles:
        return [whole]
    parts = zip(stack.roles, _rows(checkpoint, whole, stack.roles, stack.layout), strict=True)
    return [whole.part(name, rows, of_all) for name, rows in parts]


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor can be compressed as one matrix, or as parts of one."""
    # biases of fused experts have two dimensions
    bias = info.name.endswith("bias")
    return len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and info.count > 0 and not bias


def find_matrix(checkpoint: Checkpoint, name: str) -> MatrixInfo:
    """The matrix that has a name: that of a tensor, or of a part of one.

    Raises:
        CheckpointError: there is none.
    """
    family = Family(checkpoint.config)
    info, part = _tensor_and_part(checkpoint, name)
    if part and is_stack(info):  # one of hundreds of experts
        candidates = _of_expert(checkpoint, family.role_of(info.name), info, int(part.partition(".")[0]))
    else:
        candidates = matrices_of(checkpoint, family, info)
    if (found := next((matrix for matrix in candidates if matrix.name == name), None)) is None:
        raise CheckpointError(f"{checkpoint.store.root}: {name} is no matrix of the checkpoint; look at `swsc plan`")
    return found


def _tensor_and_part(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, str]:
    """The tensor that holds a matrix, and the name of the part that it is ("" for the whole)."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name], ""
    words = name.removesuffix(".weight").split(".")
    stems = {".".join(words[:-count]): ".".join(words[-count:]) for count in (1, 2)}
    candidates = {tensor: part for stem, part in stems.items() for tensor in (f"{stem}.weight", stem)}
    return next(
        (checkpoint.tensors[tensor], part) for tensor, part in candidates.items() if tensor in checkpoint.tensors
    )


def fused_tensors(matrices: Iterable[MatrixInfo]) -> tuple[FusedTensor, ...]:
    """The tensors that fuse some of the given matrices."""
    parts: dict[str, list[MatrixInfo]] = {}
    for matrix in matrices:
        if matrix.location.row_blocks is not None:
            parts.setdefault(matrix.tensor.name, []).append(matrix)
    return tuple(FusedTensor(found[0].tensor, tuple(found)) for found in parts.values())


def _rows(checkpoint: Checkpoint, whole: MatrixInfo, roles: tuple[str, ...], layout: FusedLayout) -> list[RowBlocks]:
    """The rows of each part of a fused matrix."""
    where, m = checkpoint.store.root, whole.shape[0]
    try:
        count, lengths = layout(text_config(checkpoint.config), m)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: config.json does not say how {whole.name} is fused ({error!r})") from None
    group = sum(lengths)
    parts = [RowBlocks(sum(lengths[:number]), length, group, count) for number, length in enumerate(lengths)]
    if group * count != m or not _is_partition(parts):
        raise CheckpointError(
            f"{where}: {whole.name} has {m} rows, but by config.json {'+'.join(roles)} take {count} times"
            f" {'+'.join(map(str, lengths))}; download both again, or --exclude it"
        )
    return parts


def _is_partition(parts: list[RowBlocks]) -> bool:
    try:
        require_partition(0, parts)
    except ValueError:
        return False
    return True
