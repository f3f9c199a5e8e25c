"""What a sweep consists of: runs (a model × a variant) and the units that they share.

A unit is one tensor of one model compressed in one way. Q at 3 bits is the same unit in "Q" and in "Q and K".
"""

from dataclasses import dataclass, field
from typing import Any

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.compression.job import CompressionVariant
from pipeline.engine.task import Task
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation.flow import require_measurable
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine
from pipeline.planning.plan import Plan, make_plan
from pipeline.settings.sweep import SweepSettings, Variant
from pipeline.texts.windows import Windows, make_windows
from pipeline.variants.tuned_variant import TunedVariant

UNCOMPRESSED = "uncompressed"
Unit = tuple[int, str, CompressionVariant]  # model, tensor, how it is compressed


@dataclass
class Run:
    """One model × one variant: what it needs, and what has been measured of it."""

    model: int
    variant: Variant | None  # None: the model as it is
    plan: Plan | None
    hessians: Hessians | None = None  # of a variant that measures errors by activations
    made: TunedVariant | None = None  # of a variant whose matrices are tuned together: it is no sum of units
    units: dict[str, Unit] = field(default_factory=dict)  # tensor -> unit
    missing: set[Unit] = field(default_factory=set)
    parts: list[Task[Any]] = field(default_factory=list)  # evaluation tasks not yet given out
    outstanding: int = 0  # evaluation tasks not yet done
    losses: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)  # (evaluation, first window)
    dtypes: dict[int, str] = field(default_factory=dict)  # evaluation -> arithmetic it was measured in
    error: str | None = None
    lost: str | None = None  # what was said when one of its units was not there any more
    begun_again: int = 0  # times that its units had to be made again

    def begin(self) -> None:
        """All units are missing yet."""
        self.units = self.all_units()
        self.missing = set(self.units.values())

    def all_units(self) -> dict[str, Unit]:
        """The units that the run is made of, by tensor."""
        if self.variant is None or self.plan is None or self.made:
            return {}
        seed, dtype = self.variant.seed, self.variant.storage_dtype
        return {
            decision.info.name: (
                self.model,
                decision.info.name,
                CompressionVariant(decision.specs, seed, dtype, self.hessians),
            )
            for decision in self.plan.compressed
        }

    @property
    def name(self) -> str:
        return self.variant.name if self.variant else UNCOMPRESSED


def open_models(settings: SweepSettings) -> list[Checkpoint]:
    """The models, each held against its config; CheckpointError for one that cannot be measured or compressed."""
    checkpoints = [open_checkpoint(location) for location in settings.models]
    for checkpoint in checkpoints:
        examine(Model(checkpoint, {}), settings.trust_remote_code, measured=True)
        if settings.evaluations:
            require_causal(Model(checkpoint, {}), settings.trust_remote_code)
    return checkpoints


def open_windows(settings: SweepSettings, checkpoints: list[Checkpoint]) -> list[list[Windows]]:
    """Windows of each text for each model; TextError for a text that cannot be measured on, or must not be."""
    texts = settings.evaluations
    found = [[make_windows(location, text) for text in texts] for location in settings.models]
    for checkpoint, windows in zip(checkpoints, found, strict=True):
        for own, text in zip(windows, texts, strict=True):
            require_measurable(Model(checkpoint, {}), own, text)
    return found


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
            run = Run(model, variant, plan)
            run.begin()
            runs.append(run)
    if wrong:
        raise ConfigError("; ".join(wrong))
    return runs
