"""What config.json says of compressed tensors, checked before anything is made of it: it may come from anywhere."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from pipeline.model.checkpoint import DTYPES, FLOATS

_FLOATS = tuple(DTYPES[name][0] for name in FLOATS)


class _Entry(BaseModel):
    """What every entry says; values of another kind are mistakes."""

    model_config = ConfigDict(strict=True)
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    dtype: Literal[_FLOATS]  # type: ignore[valid-type]


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
