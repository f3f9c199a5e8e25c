"""Where a matrix lies in a dense checkpoint: the one description of it, in memory and in JSON.

In `config.json`, reports and plans it is four optional keys beside the others of an entry (docs/format.md):

    {"transposed": true, "tensor": "h.0.attn.c_attn.weight", "rows": [first, length, stride, count], "stacked": 8}

A matrix that is a whole tensor [outputs, inputs] under the tensor's own name has none of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swsc_core.storage.row_blocks import RowBlocks

KEYS = ("transposed", "tensor", "rows", "stacked")
# heads, or groups of them: a count of blocks that is a billion would be counted through
_MAX_BLOCKS = 1 << 16


@dataclass(frozen=True)
class MatrixLocation:
    """Where a matrix [outputs, inputs] lies in a tensor of a dense checkpoint.

    Attributes:
        tensor: name of the tensor that fuses the matrix with others; None: the matrix is a whole tensor of its own name.
        transposed: the tensor holds [inputs, outputs] (GPT-2's Conv1D, some experts).
        row_blocks: the matrix' rows among those of the fused matrix; None: all. Of stacked experts they are counted through
            all matrices of the stack: row i of expert e, whose matrices have m rows, is row e · m + i.
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
            raise ValueError("tensor and rows describe a part of a fused tensor together, one of them is missing")
        if self.n_experts is not None and self.row_blocks is None:
            raise ValueError("stacked, but without the rows of one of the stacked matrices")

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> "MatrixLocation":
        """The location that an entry, or a row of a report, holds beside other keys.

        Raises:
            ValueError: a value of the wrong type, naming its key; keys that do not go together.
        """
        for key in KEYS:
            is_valid, expected = _VALUES[key]
            if key in about and not is_valid(about[key]):
                raise ValueError(f"{key} is {str(about[key])[:40]}, wanted {expected}")
        rows = RowBlocks(*about["rows"]) if "rows" in about else None
        return cls(about.get("tensor"), about.get("transposed", False), rows, about.get("stacked"))

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`: only keys whose values are not the default."""
        about: dict[str, Any] = {"transposed": True} if self.transposed else {}
        if self.row_blocks is not None:
            rows = self.row_blocks
            about |= {"tensor": self.tensor, "rows": [rows.first, rows.length, rows.stride, rows.count]}
        return about if self.n_experts is None else about | {"stacked": self.n_experts}

    def require_rows(self, m: int) -> None:
        """Raise ValueError unless a matrix of `m` rows lies here."""
        if (rows := self.row_blocks) and (rows.total != m or rows.count > _MAX_BLOCKS):
            raise ValueError(f"rows {self.to_json()['rows']} are not the {m} of its shape")

    def expert(self, rows_per_expert: int) -> int | None:
        """Number of the expert whose matrix this is, or is a part of; None if the tensor is no stack."""
        return None if self.n_experts is None or self.row_blocks is None else self.row_blocks.first // rows_per_expert

    def rows_in_expert(self, rows_per_expert: int) -> RowBlocks | None:
        """The rows counted within the matrix of the expert; `row_blocks` if the tensor is no stack."""
        number = self.expert(rows_per_expert)
        return self.row_blocks.shifted(-number * rows_per_expert) if number and self.row_blocks else self.row_blocks

    def tensor_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the tensor whose fused matrix is [m, n], with the rows of all experts: [m, n], [n, m], [experts, …]."""
        experts = () if self.n_experts is None else (self.n_experts,)
        rows = m // (self.n_experts or 1)
        return (*experts, *((n, rows) if self.transposed else (rows, n)))

    def to_checkpoint_layout(self, matrix: Tensor) -> Tensor:
        """A whole fused matrix [m, n] as its tensor lies in a dense checkpoint, of shape `tensor_shape(m, n)`."""
        if self.n_experts is not None:
            matrix = matrix.reshape(self.n_experts, -1, matrix.shape[1])
        return matrix.transpose(-2, -1).contiguous() if self.transposed else matrix


def row_blocks_of(locations: Iterable[MatrixLocation]) -> list[RowBlocks]:
    """The rows of each part of a fused matrix.

    Raises:
        ValueError: a location that is of no part.
    """
    known = list(locations)
    found = [location.row_blocks for location in known if location.row_blocks is not None]
    if len(found) < len(known):
        raise ValueError("an entry does not say which rows of the fused matrix it is of")
    return found


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(one) is int and one >= 0 for one in value)


# key -> whether a value is valid, and what is
_VALUES = {
    "transposed": (lambda value: isinstance(value, bool), "true or false"),
    "tensor": (lambda value: isinstance(value, str) and bool(value), "the name of a tensor"),
    "rows": (_is_rows, "four numbers"),
    "stacked": (lambda value: type(value) is int and value >= 1, "a positive number"),
}
