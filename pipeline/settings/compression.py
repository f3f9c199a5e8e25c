"""Settings of `swsc compress` and `swsc plan` beyond those of the matrices: format and handling of the output."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.validation import Option, Settings

_OUTPUT = "output"


class CompressSettings(MatrixSettings):
    """The compression of one model: everything that determines the bytes of its output, except the calibration."""

    format: Annotated[Literal["swsc", "dense"], Option(group=_OUTPUT)] = Field(
        "swsc", description="Write compressed weights (swsc), or restored weights that any loader opens (dense)."
    )


class OutputSettings(Settings):
    """Conditions for writing an output; the bytes of the output do not depend on them."""

    groups: ClassVar[tuple[str, ...]] = (_OUTPUT,)
    overwrite: bool = Field(
        False, description="Replace an existing output that is damaged or was written with other settings."
    )
    require_coverage: Annotated[float | None, Option("SHARE")] = Field(
        None,
        gt=0,
        le=1,
        description="Stop before any work if less than this share of the model's weights would be compressed.",
    )
