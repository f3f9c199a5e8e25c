"""What a sweep consists of: runs (a model × a variant) and the units that they share.

A unit is one tensor of one model compressed in one way. Q at 3 bits is the same unit in "Q" and in "Q and K".
"""

from dataclasses import dataclass, field

from pipeline.config import SweepSettings, Variant
from pipeline.errors import ConfigError, UserError
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.plan import Plan, make_plan
from pipeline.run.pool import Task
from swsc_core.spec import Spec

UNCOMPRESSED = "uncompressed"
Way = tuple[tuple[Spec, ...], int, str | None]  # specs, seed, storage dtype
Unit = tuple[int, str, Way]  # model, tensor, way


@dataclass
class Run:
    """One model × one variant: what it needs, and what has been measured of it."""

    model: int
    variant: Variant | None  # None: the model as it is
    plan: Plan | None
    units: dict[str, Unit] = field(default_factory=dict)  # tensor -> unit
    missing: set[Unit] = field(default_factory=set)
    parts: list[Task] = field(default_factory=list)  # evaluation tasks not yet given out
    outstanding: int = 0  # evaluation tasks not yet done
    losses: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (evaluation, first window)
    dtypes: dict[int, str] = field(default_factory=dict)  # evaluation -> arithmetic it was measured in
    error: str | None = None

    @property
    def name(self) -> str:
        return self.variant.name if self.variant else UNCOMPRESSED


def make_runs(settings: SweepSettings, checkpoints: list[Checkpoint]) -> list[Run]:
    """Plan every variant on every model; ConfigError names all that do not fit, before any work."""
    runs, wrong = [], []
    for model, checkpoint in enumerate(checkpoints):
        if settings.uncompressed and settings.evaluations:
            runs.append(Run(model, None, None))
        for variant in settings.variants:
            try:
                plan = make_plan(checkpoint, variant)
            except UserError as error:
                wrong.append(f"variant {variant.name}: {error}")
                continue
            units = units_of(model, variant, plan)
            runs.append(Run(model, variant, plan, units, set(units.values())))
    if wrong:
        raise ConfigError("; ".join(wrong))
    return runs


def units_of(model: int, variant: Variant, plan: Plan) -> dict[str, Unit]:
    """The units that a variant is made of, by tensor."""
    return {
        decision.info.name: (model, decision.info.name, (decision.specs, variant.seed, variant.storage_dtype))
        for decision in plan.compressed
    }
