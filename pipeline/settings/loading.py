"""Settings for loading a model, and the description of texts that calibration and evaluation share."""

from typing import Annotated, ClassVar

from pydantic import Field

from pipeline.settings.validation import Option, Settings

TEXT_SOURCES = (
    "a text file, a table (.jsonl, .json, .csv, .tsv, .parquet), one of these compressed (.gz, .zst, .xz, .bz2), or a"
    " data set of the Hub as NAME[:CONFIG[:SPLIT]]"
)
TextColumn = Annotated[str | None, Option("NAME", default="text, or the only column of strings")]
TEXT_COLUMN = Field(None, min_length=1, description="Column that holds the text, if the text is a table.")
_MODEL = "loading the model"


class LoadSettings(Settings):
    """How a model is loaded for calibration or evaluation."""

    groups: ClassVar[tuple[str, ...]] = (_MODEL,)
    trust_remote_code: bool = Field(
        False,
        description="Allow transformers to run Python code that the model directory contains; read that code first.",
    )


class SourceSettings(Settings):
    """How the weight files of a model are verified before they are used."""

    groups: ClassVar[tuple[str, ...]] = (_MODEL,)
    verify_source: Annotated[str | None, Option("hub|FILE")] = Field(
        None,
        min_length=1,
        description="Check the model's weight files against the sha256 that the Hub publishes (hub), or against a FILE"
        " in the format of sha256sum.",
    )
