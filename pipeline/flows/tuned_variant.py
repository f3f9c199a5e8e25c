"""A variant of a model whose matrices were tuned together."""

from dataclasses import dataclass
from typing import Any

from pipeline.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class TunedVariant:
    """A variant as a finished directory in the cache, the rows of its report by tensor, and what the report says of its tuning."""

    checkpoint: Checkpoint
    rows: dict[str, dict[str, Any]]
    tuning: dict[str, Any]
