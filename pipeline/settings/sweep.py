"""Settings of `swsc sweep`: models × variants × evaluations."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.validation import CommaList

# Name of the row of the uncompressed model, which no variant may have.
_UNCOMPRESSED = "uncompressed"


class Variant(MatrixSettings):
    """One compression of a sweep: a row of its result."""

    name: str = Field(min_length=1, description="Unique name of the row.")
    reference: dict[str, float | None] = Field({}, description="Published perplexity of this row, by model.")


class SweepSettings(CalibrationSettings):
    """Models × variants × evaluations, run over one pool of workers."""

    groups: ClassVar[tuple[str, ...]] = ("sweep",)
    models: CommaList = Field((), description="Models; --model replaces them.")
    variants: tuple[Variant, ...] = Field(min_length=1, description="Compressions of each model.")
    evaluations: tuple[EvaluateSettings, ...] = Field((), description="Texts that every variant is evaluated on.")
    uncompressed: bool = Field(True, description="Also evaluate each uncompressed model.")
    reference: dict[str, float | None] = Field(
        {}, description="Published perplexity of the uncompressed model, by model."
    )
    matrices: bool = Field(False, description="Also print one row per matrix.")
    keep_tuned: bool = Field(
        False, description="Keep tuned models in the cache after their evaluation, for a later sweep."
    )

    @model_validator(mode="before")
    @classmethod
    def _trust_in_evaluations(cls, values: Any) -> Any:
        """Apply `trust_remote_code` of the sweep to each of its evaluations."""
        if not isinstance(values, dict) or not values.get("trust_remote_code"):
            return values
        evaluations = values.get("evaluations")
        if not isinstance(evaluations, list | tuple):
            return values
        trusting = [{"trust_remote_code": True, **item} if isinstance(item, dict) else item for item in evaluations]
        return {**values, "evaluations": trusting}

    @model_validator(mode="after")
    def _require_unique_names(self) -> Self:
        names = [variant.name for variant in self.variants]
        if repeated := sorted({*_repeated(names), *({_UNCOMPRESSED} & set(names))}):
            raise ValueError(f"variants share a name, or have a reserved one: {', '.join(repeated)}")
        if repeated := _repeated(self.models):
            raise ValueError(f"models are named twice: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _require_calibration_text(self) -> Self:
        names = [v.name for v in self.variants if v.needs_calibration and not v.preset_definition.generates_text]
        if names and self.calibration is None:
            raise ValueError(f"variants {', '.join(names)} need a calibration text: set the key calibration")
        return self

    def calibration_of(self, variant: Variant) -> CalibrationSettings:
        """Calibration settings of a variant: without a text if its preset generates one."""
        return self.model_copy(update={"calibration": None}) if variant.preset_definition.generates_text else self


def _repeated(names: Iterable[str]) -> list[str]:
    counts = Counter(names)
    return sorted(name for name, count in counts.items() if count > 1)
