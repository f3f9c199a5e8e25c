"""A variant of a model after tuning."""

from dataclasses import dataclass

from pipeline.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class TunedVariant:
    """A variant as a finished directory in the cache.

    Attributes:
        rows: the rows of its report, as JSON.
        applied: whether tuning lowered the divergence, so that the tuned values are stored.
    """

    checkpoint: Checkpoint
    rows: list[dict[str, object]]
    applied: bool
