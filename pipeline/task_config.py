"""Settings of tasks of lm-evaluation-harness, understood as it understands them."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import MeasureSettings
from pipeline.validation import CommaList


def _four(value: object) -> object:
    """One seed for all, or four."""
    seeds = value.split(",") if isinstance(value, str) else value
    return seeds * 4 if isinstance(seeds, list) and len(seeds) == 1 else seeds


Seeds = Annotated[tuple[int, int, int, int], BeforeValidator(_four)]


class TaskSettings(MeasureSettings):
    """Tasks of lm-evaluation-harness."""

    tasks: CommaList = Field(
        min_length=1, description="tasks, groups or patterns of lm-eval, or YAML files, separated by commas"
    )
    include_path: str | None = Field(None, description="directory of further tasks as YAML files")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question (default: the task's own)")
    limit: float | None = Field(None, gt=0, description="first N documents of each task; below 1: share of them")
    seed: Seeds = Field(
        (0, 1234, 1234, 1234), description="seeds of Python, numpy, torch and few-shot examples; or one for all"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if twice:
            raise ValueError(f"tasks are named twice: {', '.join(twice)}")
        return self
