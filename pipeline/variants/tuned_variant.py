"""A variant of a model after tuning."""

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class TunedVariant:
    """A variant as a finished directory in the cache.

    Attributes:
        rows: the rows of its report, as JSON.
        tuning: what the report states about the tuning.
    """

    checkpoint: Checkpoint
    rows: list[dict[str, Any]]
    tuning: dict[str, Any]
