"""Which spec each matrix gets: rate–distortion curves from the second moments, and a budget divided by them.

The loss of a matrix is foretold as a product. `reach`, a closed form of its weights and moments, is what its weights would
lose if nothing of them were kept but the scale of their rows. `share`, what a spec leaves of that, is measured once for
each kind of matrix (role and shape) on some rows of one of them. Both are kept beside the moments, for each selection of
matrices: another budget costs nothing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.allocation.job import MeasureDistortions, MeasureSensitivity, SpecDistortion
from pipeline.architectures.tensor_names import tensor_kind
from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.planning.cost_model import compression_bytes, device_bytes
from pipeline.planning.plan import Decision, Plan, with_specs
from pipeline.planning.spec_resolution import budget_bytes, value_bits
from pipeline.settings.matrix import MatrixSettings
from pipeline.storage.cache_key import cache_name, versioned
from pipeline.storage.records import CurvesRecord, read_cached, read_record
from swsc_core.allocation.allocate import Choice, allocate, equal_shares
from swsc_core.allocation.candidate_specs import candidates
from swsc_core.method.spec import Spec, SwscSpec

_SHOWN = 200  # characters of a spec that is refused

V = TypeVar("V")


def allocate_plan(source: Checkpoint, plan: Plan, settings: MatrixSettings, hessians: Hessians, pools: Pools) -> Plan:
    """`plan` with the specs that lose least within the budget; that it can be met, the plan has made sure."""
    curves = _curves(source, plan, settings, hessians, pools)
    choices = [_choices(decision, settings, curves) for decision in plan.compressed]
    specs = _divide(source, plan, choices, settings)
    return with_specs(plan, {d.info.name: (spec,) for d, spec in zip(plan.compressed, specs, strict=True)}, settings)


def _divide(source: Checkpoint, plan: Plan, choices: list[list[Choice]], settings: MatrixSettings) -> list[Spec]:
    counts = [decision.info.count for decision in plan.compressed]
    budget = budget_bytes(source, [decision.matrix for decision in plan.compressed], settings)
    if settings.allocation == "measured":
        return [choice.spec for choice in allocate(choices, budget)]
    least = [min(choice.nbytes for choice in own) for own in choices]
    shares = equal_shares(counts, least, budget)
    return [allocate([own], nbytes)[0].spec for own, nbytes in zip(choices, shares, strict=True)]


def _choices(decision: Decision, settings: MatrixSettings, curves: dict[str, Any]) -> list[Choice]:
    info = decision.matrix
    shape, width = info.shape, value_bits(info.dtype, settings)
    reach = curves["reach"][info.name]
    return [
        Choice(spec, spec.stored_bytes(shape, width), reach * share)
        for values, share in curves["shares"][curve_key(info)]
        for spec in [replace(SwscSpec(**values), rounds=settings.max_rounds)]
    ]


def curve_key(info: MatrixInfo) -> str:
    """Matrices that share a curve: those whose names differ in numbers only."""
    return f"{tensor_kind(info.name)} {list(info.shape)}"


def _curves(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, hessians: Hessians, pools: Pools
) -> dict[str, Any]:
    """Reach of every matrix and shares of every kind, measured or read again."""
    infos = [decision.matrix for decision in plan.compressed]
    identity = versioned("curves", {
        "seed": settings.seed, "matrices": sorted(info.name for info in infos), "gradient_share": hessians.gradient_share,
        "widths": sorted({value_bits(info.dtype, settings) for info in infos}),
    })  # fmt: skip
    file = f"{cache_name('curves', identity)}.json"
    if hessians.store.exists(file):
        return read_cached(hessians.store, file, lambda: _read(hessians, file, infos, settings))
    run = partial(_results, plan=plan, pools=pools)
    reaches: dict[str, float] = run(
        [Task(i.name, MeasureSensitivity(source.store, i, hessians), f"sensitivity of {i.name}") for i in infos],
        "reach",
    )
    found: dict[tuple[str, int], tuple[SpecDistortion, ...]] = run(
        _share_tasks(source, infos, settings, hessians, reaches), "curves"
    )
    shares: dict[str, list[Any]] = {}
    for kind, place in sorted(found):
        shares.setdefault(kind, []).extend((asdict(one.spec), one.share) for one in found[kind, place])
    curves = {"identity": identity, "reach": reaches, "shares": shares}
    hessians.store.write_json(file, curves)
    return curves


def _read(hessians: Hessians, file: str, infos: Sequence[MatrixInfo], settings: MatrixSettings) -> dict[str, Any]:
    """Curves as they were written, of all these matrices: of specs on the menu, and of losses that are numbers."""
    kept = read_record(hessians.store, file, CurvesRecord)
    offered = {_offered(info, settings) for info in infos}
    menu = {_text(spec) for shape, bits in offered for spec in candidates(shape, bits)}
    reach = {info.name: _loss(kept["reach"][info.name]) for info in infos}
    shares = {
        kind: [(values, _loss(share)) for values, share in kept["shares"][kind]] for kind in map(curve_key, infos)
    }
    for values, _ in (choice for own in shares.values() for choice in own):
        if json.dumps(values, sort_keys=True) not in menu:
            raise ValueError(f"shares: no spec that is chosen among: {str(values)[:_SHOWN]}")
    if not all(shares.values()):
        raise ValueError("shares: a kind of matrix without a spec")
    return {"reach": reach, "shares": shares}


def _offered(info: MatrixInfo, settings: MatrixSettings) -> tuple[tuple[int, int], int]:
    """What the menu of a matrix depends on: its shape, and bits of a stored value."""
    return info.shape, value_bits(info.dtype, settings)


def _text(spec: SwscSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


def _loss(value: object) -> float:
    """A loss as it was written; ValueError or OverflowError if it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value} is no loss")
    return float(value)


def _results(tasks: list[Task[V]], what: str, plan: Plan, pools: Pools) -> dict[Any, V]:
    """What each task returned, by its key."""
    found: dict[Any, V] = {}

    def note(done: TaskResult[V]) -> None:
        found[done.task.key] = done.value

    run_stage(pools, Stage(what, compression_bytes(plan), device_bytes(plan)), tasks, note)
    return found


def _share_tasks(
    source: Checkpoint,
    infos: Sequence[MatrixInfo],
    settings: MatrixSettings,
    hessians: Hessians,
    reaches: dict[str, float],
) -> list[Task[tuple[SpecDistortion, ...]]]:
    kinds: dict[str, list[MatrixInfo]] = {}
    for info in infos:
        kinds.setdefault(curve_key(info), []).append(info)
    tasks = []
    for kind, members in kinds.items():
        middle = _typical(members, hessians, reaches)
        specs = list(candidates(*_offered(middle, settings)))
        for place, some in enumerate(_dealt(specs)):
            job = MeasureDistortions(source.store, middle, hessians, tuple(some), settings.seed)
            tasks.append(Task((kind, place), job, f"curve of {middle.name}"))
    return tasks


def _typical(members: Sequence[MatrixInfo], hessians: Hessians, reaches: dict[str, float]) -> MatrixInfo:
    """The middle one of those that most tokens reached and that have anything to lose.

    An expert that got no token, or a matrix of zeros, says nothing of the others.
    """
    rank = {info: (reaches[info.name] > 0, hessians.tokens(info.name)) for info in members}
    telling = [info for info in members if rank[info] == max(rank.values())]
    return telling[len(telling) // 2]


def _dealt(specs: list[SwscSpec], size: int = 3) -> list[list[SwscSpec]]:
    return [specs[start : start + size] for start in range(0, len(specs), size)]
