"""Location of a matrix in a dense checkpoint, in memory and in JSON.

In `config.json`, reports and plans the location is up to four optional keys of an entry (docs/format.md):

    {"transposed": true, "tensor": "h.0.attn.c_attn.weight", "rows": [first, length, stride, count], "stacked": 8}

A matrix that is a whole tensor [outputs, inputs] under the tensor's own name has none of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from swsc_core.storage.json_fields import (
    FLAG,
    JsonValue,
    integer,
    integers,
    json_field,
    non_empty_string,
    read_fields,
    written_fields,
)
from swsc_core.storage.row_blocks import RowBlocks

# Blocks are heads or groups of heads; loops over them must end for any number that a file states.
_MAX_BLOCKS = 1 << 16


@dataclass(frozen=True)
class _LocationJson:
    """The JSON keys of a location."""

    transposed: bool = json_field(FLAG, "true or false", default=False)
    tensor: str | None = json_field(non_empty_string, "the name of a tensor", default=None)
    rows: tuple[int, int, int, int] | None = json_field(integers(4, 0), "four numbers", default=None)
    stacked: int | None = json_field(integer(1), "a positive number", default=None)


KEYS = tuple(key.name for key in fields(_LocationJson))


@dataclass(frozen=True)
class MatrixLocation:
    """Location of a matrix [outputs, inputs] in a tensor of a dense checkpoint.

    Attributes:
        tensor: name of the tensor that fuses the matrix with others; None: the matrix is a whole tensor of its own
            name.
        transposed: the tensor holds [inputs, outputs] (GPT-2's Conv1D, some experts).
        row_blocks: the rows of the matrix among those of the fused matrix; None: all. In stacked experts, rows are
            counted through all matrices of the stack: row i of expert e, whose matrices have m rows, is row e · m + i.
        n_experts: number of matrices that the tensor stacks, [n_experts, …]; None: the tensor is one matrix.

    Raises:
        ValueError: `tensor` without `row_blocks` or the reverse, or `n_experts` without either.
    """

    tensor: str | None = None
    transposed: bool = False
    row_blocks: RowBlocks | None = None
    n_experts: int | None = None

    def __post_init__(self) -> None:
        if (self.tensor is None) != (self.row_blocks is None):
            raise ValueError("only one of tensor and rows is given; a piece of a fused tensor needs both")
        if self.n_experts is not None and self.row_blocks is None:
            raise ValueError("stacked is given without rows; one of several stacked matrices needs both")

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "MatrixLocation":
        """The location in an entry or a row of a report; other keys are ignored.

        Raises:
            ValueError: a value of the wrong type, naming its key, or keys that do not go together.
        """
        keys = _LocationJson(**read_fields(_LocationJson, data))
        return cls(keys.tensor, keys.transposed, RowBlocks(*keys.rows) if keys.rows else None, keys.stacked)

    def to_json(self) -> dict[str, JsonValue]:
        """Inverse of `from_json`; keys with default values are omitted."""
        blocks = self.row_blocks
        rows = None if blocks is None else (blocks.first, blocks.length, blocks.stride, blocks.count)
        return written_fields(_LocationJson(self.transposed, self.tensor, rows, self.n_experts))

    def require_rows(self, m: int) -> None:
        """Raise ValueError unless the location has `m` rows."""
        if (rows := self.row_blocks) and (rows.total != m or rows.count > _MAX_BLOCKS):
            raise ValueError(f"rows {self.to_json()['rows']} do not match the {m} rows of its shape")

    def expert(self, rows_per_expert: int) -> int | None:
        """Index of the expert that the matrix belongs to; None if the tensor is no stack."""
        return None if self.n_experts is None or self.row_blocks is None else self.row_blocks.first // rows_per_expert

    def rows_in_expert(self, rows_per_expert: int) -> RowBlocks | None:
        """The rows counted within the expert's matrix; `row_blocks` if the tensor is no stack."""
        index = self.expert(rows_per_expert)
        return self.row_blocks.shifted(-index * rows_per_expert) if index and self.row_blocks else self.row_blocks

    def tensor_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the tensor whose fused matrix, with the rows of all experts, is [m, n].

        It is [m, n], or [n, m] if transposed; a stack is [experts, rows, columns].
        """
        experts = () if self.n_experts is None else (self.n_experts,)
        rows = m // (self.n_experts or 1)
        return (*experts, *((n, rows) if self.transposed else (rows, n)))

    def to_checkpoint_layout(self, matrix: Tensor) -> Tensor:
        """A whole fused matrix [m, n] in the layout of its tensor in a checkpoint, of shape `tensor_shape(m, n)`."""
        if self.n_experts is not None:
            matrix = matrix.reshape(self.n_experts, -1, matrix.shape[1])
        return matrix.transpose(-2, -1).contiguous() if self.transposed else matrix


def row_blocks_of(locations: Iterable[MatrixLocation]) -> list[RowBlocks]:
    """The rows of each piece of a fused matrix.

    Raises:
        ValueError: a location without rows.
    """
    pieces = list(locations)
    row_blocks = [piece.row_blocks for piece in pieces if piece.row_blocks is not None]
    if len(row_blocks) < len(pieces):
        raise ValueError("an entry of a fused tensor does not state its rows; download config.json again")
    return row_blocks
