"""A variant of a model whose matrices were tuned together."""

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class TunedVariant:
    """A variant as a finished directory in the cache, the rows of its report as JSON, and what the report says of its tuning."""

    checkpoint: Checkpoint
    table: list[dict[str, Any]]
    tuning: dict[str, Any]
