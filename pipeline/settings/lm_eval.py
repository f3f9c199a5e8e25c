"""Settings of an evaluation on tasks of lm-evaluation-harness, with the meaning that the library gives them."""

from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.settings.evaluation import MeasureSettings
from pipeline.settings.validation import CommaList, Option


def _four_seeds(value: object) -> object:
    """Repeat a single seed four times."""
    seeds = value.split(",") if isinstance(value, str) else value
    return seeds * 4 if isinstance(seeds, list) and len(seeds) == 1 else seeds


Seeds = Annotated[tuple[int, int, int, int], BeforeValidator(_four_seeds)]


class LmEvalSettings(MeasureSettings):
    """Tasks of lm-evaluation-harness."""

    groups: ClassVar[tuple[str, ...]] = ("lm-eval tasks",)
    tasks: Annotated[CommaList, Option("NAMES")] = Field(
        min_length=1, description="Tasks, groups or patterns of lm-eval, or YAML files of tasks, comma-separated."
    )
    include_path: Annotated[str | None, Option("DIR")] = Field(
        None, description="Directory of further tasks as YAML files."
    )
    num_fewshot: Annotated[int | None, Option(default="the number that the task defines")] = Field(
        None, ge=0, description="Number of few-shot examples before each question."
    )
    limit: Annotated[float | None, Option("N", default="all")] = Field(
        None, gt=0, description="Evaluate the first N documents of each task; below 1, that share of them."
    )
    seed: Annotated[Seeds, Option("SEEDS")] = Field(
        (0, 1234, 1234, 1234),
        description="Seeds of Python, NumPy, PyTorch and few-shot examples, comma-separated; or one for all.",
    )

    @model_validator(mode="after")
    def _require_unique_tasks(self) -> Self:
        repeated = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks are named twice: {', '.join(repeated)}")
        return self
