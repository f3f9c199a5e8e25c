"""Allocation flow: measures the rate–distortion curves with the workers, and divides the budget of bytes by them.

The curves are cached beside the Hessians, once per selection of matrices. Another budget therefore needs no new
measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.allocation.curves import DistortionCurves, SpecDistortion, candidate_specs, curve_key
from pipeline.allocation.job import MeasureDistortions, MeasureSensitivity
from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.planning.memory import compression_memory
from pipeline.planning.plan import Plan, with_specs
from pipeline.planning.spec_resolution import budget_bytes, value_bits
from pipeline.settings.matrix import MatrixSettings
from pipeline.storage.cache_key import cache_name, versioned
from swsc_core.allocation.allocate import Choice, allocate, equal_shares
from swsc_core.method.spec import Spec

# Specs that one task measures.
_SPECS_PER_TASK = 3

V = TypeVar("V")


def allocate_plan(source: Checkpoint, plan: Plan, settings: MatrixSettings, hessians: Hessians, pools: Pools) -> Plan:
    """`plan` with the specs that lose least within the budget. The planner has checked that the budget can be met."""
    curves = _CurveMeasurement(source, plan, settings, hessians, pools).curves()
    choices = [curves.choices(decision.matrix, settings) for decision in plan.compressed]
    specs = _divide(source, plan, choices, settings)
    return with_specs(plan, {d.info.name: (spec,) for d, spec in zip(plan.compressed, specs, strict=True)}, settings)


def _divide(source: Checkpoint, plan: Plan, choices: list[list[Choice]], settings: MatrixSettings) -> list[Spec]:
    """The spec of each matrix, under the budget of the settings."""
    counts = [decision.info.count for decision in plan.compressed]
    budget = budget_bytes(source, [decision.matrix for decision in plan.compressed], settings)
    if settings.allocation == "measured":
        return [choice.spec for choice in allocate(choices, budget)]
    smallest = [min(choice.nbytes for choice in curve) for curve in choices]
    shares = equal_shares(counts, smallest, budget)
    return [allocate([curve], nbytes)[0].spec for curve, nbytes in zip(choices, shares, strict=True)]


@dataclass(frozen=True, order=True)
class _PartKey:
    """Key of a task that measures some specs of a curve."""

    curve: str
    part: int


@dataclass(frozen=True)
class _CurveMeasurement:
    """Measures the curves of the matrices of a plan, or reads them from the cache."""

    source: Checkpoint
    plan: Plan
    settings: MatrixSettings
    hessians: Hessians
    pools: Pools

    def curves(self) -> DistortionCurves:
        store = self.hessians.store
        infos = [decision.matrix for decision in self.plan.compressed]
        identity = self._identity(infos)
        file = f"{cache_name('curves', identity)}.json"
        if store.exists(file):
            return DistortionCurves.read(store, file, infos, self.settings)
        sensitivities = self._sensitivities(infos)
        curves = DistortionCurves(sensitivities, self._distortions(infos, sensitivities))
        curves.write(store, file, identity)
        return curves

    def _identity(self, infos: Sequence[MatrixInfo]) -> dict[str, object]:
        return versioned(
            "curves",
            {
                "seed": self.settings.seed,
                "matrices": sorted(info.name for info in infos),
                "gradient_share": self.hessians.gradient_share,
                "widths": sorted({value_bits(info.dtype, self.settings) for info in infos}),
            },
        )

    def _sensitivities(self, infos: Sequence[MatrixInfo]) -> dict[str, float]:
        tasks = [
            Task(
                info.name,
                MeasureSensitivity(self.source.store, info, self.hessians.of([info.name])),
                f"sensitivity of {info.name}",
            )
            for info in infos
        ]
        return self._run("sensitivities", tasks)

    def _distortions(
        self, infos: Sequence[MatrixInfo], sensitivities: Mapping[str, float]
    ) -> dict[str, list[SpecDistortion]]:
        groups: dict[str, list[MatrixInfo]] = {}
        for info in infos:
            groups.setdefault(curve_key(info), []).append(info)
        tasks = []
        for key, group in groups.items():
            typical = self._typical(group, sensitivities)
            specs = tuple(candidate_specs(typical, self.settings))
            for part, start in enumerate(range(0, len(specs), _SPECS_PER_TASK)):
                some = specs[start : start + _SPECS_PER_TASK]
                hessians = self.hessians.of([typical.name])
                job = MeasureDistortions(self.source.store, typical, hessians, some, self.settings.seed)
                tasks.append(Task(_PartKey(key, part), job, f"curve of {typical.name}"))
        distortions: dict[str, list[SpecDistortion]] = {}
        for part_key, measured in sorted(self._run("curves", tasks).items()):
            distortions.setdefault(part_key.curve, []).extend(measured)
        return distortions

    def _typical(self, group: Sequence[MatrixInfo], sensitivities: Mapping[str, float]) -> MatrixInfo:
        """The middle one of the matrices with a positive sensitivity that the most tokens reached.

        An expert without tokens or a matrix of zeros would not represent the others.
        """
        rank = {info: (sensitivities[info.name] > 0, self.hessians.tokens(info.name)) for info in group}
        best = [info for info in group if rank[info] == max(rank.values())]
        return best[len(best) // 2]

    def _run(self, stage: str, tasks: list[Task[V]]) -> dict[Any, V]:
        """The value of each task, by its key."""
        values: dict[Any, V] = {}

        def on_done(done: TaskResult[V]) -> None:
            values[done.task.key] = done.value

        run_stage(self.pools, Stage(stage, compression_memory(self.plan)), tasks, on_done)
        return values
