"""What a sweep consists of: runs (a model × a variant) and the compressed matrices that runs share."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.compression.job import CompressionVariant
from pipeline.engine.task import Task
from pipeline.errors import ConfigError, UserError
from pipeline.planning.plan import Decision, Plan, make_plan
from pipeline.settings.compression import CompressSettings
from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.sweep import SweepSettings, Variant
from pipeline.variants.tuned_variant import TunedVariant

UNCOMPRESSED = "uncompressed"


class Unit(NamedTuple):
    """One matrix of one model, compressed in one way. The variants "Q" and "Q and K" at 3 bits share the units of Q."""

    model: int
    matrix: str
    variant: CompressionVariant


@dataclass
class Measurement:
    """The state of the evaluation of a run.

    Attributes:
        units: matrix -> unit that the evaluation needs; empty once the run is over.
        missing: units that are not compressed yet.
        tasks: evaluation tasks that are not started yet, the next one last.
        outstanding: number of evaluation tasks that have not ended.
        losses: (evaluation, first window) -> loss of each window.
        dtypes: evaluation -> data type of its computation.
        error: why the run failed.
        lost: message about a unit that was lost with its node, until the units are recomputed.
        recomputations: number of times that the units were recomputed.
    """

    units: dict[str, Unit] = field(default_factory=dict)
    missing: set[Unit] = field(default_factory=set)
    tasks: list[Task[Any]] = field(default_factory=list)
    outstanding: int = 0
    losses: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)
    dtypes: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    lost: str | None = None
    recomputations: int = 0


@dataclass
class Run:
    """One model × one variant.

    Attributes:
        number: position among the runs of the sweep.
        model: position of the model in the settings.
        variant: None for the uncompressed model.
        plan: None for the uncompressed model.
        hessians: second moments that a calibrated variant weights errors by.
        tuned: the compressed model, if its matrices are tuned together: then it does not consist of units.
    """

    number: int
    model: int
    variant: Variant | None
    plan: Plan | None
    hessians: Hessians | None = None
    tuned: TunedVariant | None = None
    measurement: Measurement = field(default_factory=Measurement)

    @property
    def name(self) -> str:
        """Name of the variant."""
        return self.variant.name if self.variant else UNCOMPRESSED

    @property
    def is_segmented(self) -> bool:
        """Whether a spec of the plan cuts channels into segments."""
        return any(spec.cuts_channels for decision in self.decisions for spec in decision.specs)

    @property
    def decisions(self) -> list[Decision]:
        """The matrices that the run compresses, with their specs."""
        return self.plan.compressed if self.plan else []

    def begin(self) -> None:
        """Start a new measurement, for which all units are missing."""
        units = self.units
        self.measurement = Measurement(units, set(units.values()))

    @property
    def units(self) -> dict[str, Unit]:
        """Matrix -> unit, of all matrices that the variant compresses."""
        if self.variant is None or self.plan is None or self.tuned:
            return {}
        return {decision.info.name: self._unit(decision, self.variant) for decision in self.plan.compressed}

    def _unit(self, decision: Decision, variant: Variant) -> Unit:
        name, hessians = decision.info.name, self.hessians.of([decision.info.name]) if self.hessians else None
        return Unit(self.model, name, CompressionVariant(decision.specs, variant.seed, variant.storage_dtype, hessians))


def make_runs(settings: SweepSettings, checkpoints: list[Checkpoint]) -> list[Run]:
    """Plan every variant on every model; ConfigError names all variants that do not fit a model."""
    runs: list[Run] = []
    mistakes = []
    for model, checkpoint in enumerate(checkpoints):
        if settings.uncompressed and settings.evaluations:
            runs.append(Run(len(runs), model, None, None))
        for variant in settings.variants:
            try:
                plan = make_plan(checkpoint, variant)
            except UserError as error:
                mistakes.append(f"variant {variant.name}: {error}")
                continue
            run = Run(len(runs), model, variant, plan)
            run.begin()
            runs.append(run)
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return runs


def settings_of(variant: Variant) -> CompressSettings:
    """The settings of a variant as those of a compression."""
    fields = variant.model_fields_set & MatrixSettings.model_fields.keys()
    return CompressSettings(**{name: getattr(variant, name) for name in fields})
