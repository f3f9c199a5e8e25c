"""Settings of an evaluation: how the model is run, and the protocol of perplexity."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.settings.loading import TEXT_COLUMN, TEXT_SOURCES, LoadSettings, TextColumn
from pipeline.settings.validation import Option


class MeasureSettings(LoadSettings):
    """How a model is run, for perplexity and for tasks of lm-eval alike."""

    groups: ClassVar[tuple[str, ...]] = ("running the model",)
    batch_size: int = Field(1, ge=1, description="Windows of text, or lm-eval requests, per forward pass.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Data type of the computation; auto is float32 on a CPU and the checkpoint's data type on a GPU.",
    )


class EvaluateSettings(MeasureSettings):
    """Perplexity on one text, by the standard protocol (pipeline/texts/windows.py)."""

    groups: ClassVar[tuple[str, ...]] = ("perplexity",)
    text: Annotated[str, Option("TEXT")] = Field(
        description=f"Evaluation text: wikitext2 (its test split), {TEXT_SOURCES} (default split: test)."
    )
    text_column: TextColumn = TEXT_COLUMN
    seqlen: Annotated[int, Option(default="2048, or the model's positions if fewer")] = Field(
        2048, ge=2, description="Tokens per window."
    )
    windows: Annotated[int | None, Option(default="all")] = Field(
        None, ge=1, description="Evaluate the first N windows only."
    )
