"""Settings of the calibration: the text, its windows, and how Hessians are gathered on it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.settings.loading import TEXT_COLUMN, TEXT_SOURCES, LoadSettings, TextColumn
from pipeline.settings.validation import Option


class CalibrationSettings(LoadSettings):
    """The calibration text, and how Hessians (second moments of layer inputs) are gathered on it."""

    groups: ClassVar[tuple[str, ...]] = ("calibration",)
    calibration: Annotated[str | None, Option("TEXT")] = Field(
        None, description=f"Calibration text: {TEXT_SOURCES} (default split: train)."
    )
    text_column: TextColumn = TEXT_COLUMN
    calibration_windows: int = Field(128, ge=1, description="Number of windows of the calibration text.")
    calibration_seqlen: int = Field(512, ge=2, description="Tokens per calibration window.")
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of the model during calibration; auto is float32 on a CPU and the checkpoint's data type"
        " on a GPU.",
    )
    gradient_share: Annotated[float, Option("SHARE")] = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of gradient-weighted tokens in the Hessian (second moment of the inputs); 0 weights all"
        " tokens equally.",
    )
    moment_gib: Annotated[float, Option("GIB")] = Field(
        4.0,
        gt=0,
        description="Memory in GiB for the Hessians that a worker accumulates in one pass over the text; less memory"
        " takes more passes.",
    )
    cache_dir: Annotated[str | None, Option("DIR", default=".swsc-cache beside the output")] = Field(
        None, description="Directory, visible to all nodes, that keeps calibration results for later runs."
    )
