"""What config.json says of compressed tensors, checked before anything is made of it: it may come from anywhere."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)  # fmt: skip

from pipeline.model.tensors import DTYPES, FLOATS

_Rows = Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(min_length=4, max_length=4)]
_MOST_BLOCKS = 1 << 16  # of a piece: heads, or groups of them
_FLOATS = tuple(DTYPES[name][0] for name in FLOATS)


class _Entry(BaseModel):
    """What every entry says; values of another kind are mistakes.

    `transposed`: the tensor that it stands for lies as [inputs, outputs]. A piece of a joined tensor has a name of its own and
    says which `rows` of `tensor` it is: first row, rows of a block, from one block to the next, number of blocks. `stacked`: how
    many matrices `tensor` is a stack of, whose rows are counted one matrix after the other.
    """

    model_config = ConfigDict(strict=True)
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    dtype: Literal[_FLOATS]  # type: ignore[valid-type]
    transposed: bool = False
    tensor: str | None = None
    rows: _Rows | None = None
    stacked: PositiveInt | None = None

    @model_validator(mode="after")
    def _whole_or_piece(self) -> Self:
        if (self.tensor is None) != (self.rows is None):
            raise ValueError("tensor and rows say together what a piece is of")
        if self.stacked and self.rows is None:
            raise ValueError("a stack of matrices has pieces")
        if self.rows and (self.rows[1] * self.rows[3] != self.shape[0] or self.rows[3] > _MOST_BLOCKS):
            raise ValueError(f"rows {self.rows} are not the {self.shape[0]} of its shape")
        return self


class _SwscEntry(_Entry):
    method: Literal["swsc"]
    n_clusters: NonNegativeInt
    rank: NonNegativeInt
    channel_axis: Literal["output", "input"]
    segment_size: PositiveInt
    codebooks: PositiveInt
    scaled: bool
    centroid_bits: Literal[4, 6, 8] | None
    factor_bits: Literal[4, 6, 8] | None


class _RtnEntry(_Entry):
    method: Literal["rtn"]
    bits: Annotated[int, Field(ge=2, le=8)]
    granularity: Literal["tensor", "channel", "group"]
    group_size: PositiveInt = 1
    symmetric: bool


_ENTRIES: TypeAdapter[Any] = TypeAdapter(dict[str, Annotated[_SwscEntry | _RtnEntry, Field(discriminator="method")]])


def what_is_wrong(entries: object) -> str:
    """The first value of `entries` (tensor name -> entry) that is missing or of a wrong kind, in words; "" if all are right."""
    try:
        _ENTRIES.validate_python(entries)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'tensors'}: {first['msg']}"
    return ""
