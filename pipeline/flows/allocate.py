"""Which spec each matrix gets: rate–distortion curves from the second moments, and a budget divided by them.

The loss of a matrix is foretold as a product. `reach`, a closed form of its weights and moments, is what its weights would
lose if nothing of them were kept but the scale of their rows. `share`, what a spec leaves of that, is measured once for
each kind of matrix (role and shape) on some rows of one of them. Both are kept beside the moments, for each selection of
matrices: another budget costs nothing.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.config import MatrixSettings
from pipeline.flows.compress import PoolMaker, run_alone
from pipeline.model.checkpoint import Checkpoint, TensorInfo
from pipeline.model.forecast import compression_bytes
from pipeline.model.moments import Moments
from pipeline.model.plan import Decision, Plan, with_specs
from pipeline.model.specs import budget_bytes, value_bits
from pipeline.run.pool import Done, Task
from swsc_core.allocation import Choice, allocate
from swsc_core.menu import candidates
from swsc_core.spec import Spec, SwscSpec

_VERSION = 5  # goes up with every change of the menu or of what is measured


def allocate_plan(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, moments: Moments, make_pool: PoolMaker
) -> Plan:
    """`plan` with the specs that lose least within the budget; that it can be met, the plan has made sure."""
    curves = _curves(source, plan, settings, moments, make_pool)
    choices = [_choices(decision, settings, curves) for decision in plan.compressed]
    specs = _divide(source, plan, choices, settings)
    return with_specs(plan, {d.info.name: (spec,) for d, spec in zip(plan.compressed, specs, strict=True)}, settings)


def _divide(source: Checkpoint, plan: Plan, choices: list[list[Choice]], settings: MatrixSettings) -> list[Spec]:
    counts = [decision.info.count for decision in plan.compressed]
    budget = budget_bytes(source, [decision.info for decision in plan.compressed], settings)
    if settings.allocation == "measured":
        return [choice.spec for choice in allocate(choices, budget)]
    share = budget / sum(counts)
    least = [min(own, key=lambda choice: choice.nbytes) for own in choices]
    alike = [max(int(share * count), small.nbytes) for count, small in zip(counts, least, strict=True)]
    return [allocate([own], nbytes)[0].spec for own, nbytes in zip(choices, alike, strict=True)]


def _choices(decision: Decision, settings: MatrixSettings, curves: dict[str, Any]) -> list[Choice]:
    info = decision.info
    shape, width = (info.shape[0], info.shape[1]), value_bits(info.dtype, settings)
    reach = curves["reach"][info.name]
    return [
        Choice(spec, spec.stored_bytes(shape, width), reach * share)
        for values, share in curves["shares"][kind_of(info)]
        for spec in [replace(SwscSpec(**values), rounds=rounds_of(settings))]
    ]


def rounds_of(settings: MatrixSettings) -> int:
    """Rounds of a preset, unless told."""
    return settings.rounds if settings.rounds is not None else {"paper": 0, "fast": 1}.get(settings.preset, 4)


def kind_of(info: TensorInfo) -> str:
    """Matrices that share a curve: those whose names differ in numbers only."""
    return f"{re.sub(r'[0-9]+', 'N', info.name)} {list(info.shape)}"


def _curves(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, moments: Moments, make_pool: PoolMaker
) -> dict[str, Any]:
    """Reach of every matrix and shares of every kind, measured or read again."""
    infos = [decision.info for decision in plan.compressed]
    identity = {"version": _VERSION, "seed": settings.seed, "matrices": sorted(info.name for info in infos)}
    identity |= {"gradient_share": moments.gradient_share}
    identity |= {"widths": sorted({value_bits(info.dtype, settings) for info in infos})}
    file = f"curves-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if moments.store.exists(file):
        kept: dict[str, Any] = moments.store.read_json(file)
        return kept
    curves: dict[str, Any] = {"identity": identity, "reach": {}, "shares": {}}

    def note(done: Done) -> None:
        kind, key = done.task.key
        if kind == "reach":
            curves["reach"] |= done.value
        else:
            curves["shares"].setdefault(key[0], {})[key[1]] = done.value

    tasks = _tasks(source, infos, settings, moments)
    run_alone(tasks, compression_bytes(plan), note, make_pool, "curves", "tasks")
    for kind, found in curves["shares"].items():
        curves["shares"][kind] = [pair for place in sorted(found) for pair in found[place]]
    moments.store.write_json(file, curves)
    return curves


def _tasks(source: Checkpoint, infos: Sequence[TensorInfo], settings: MatrixSettings, moments: Moments) -> list[Task]:
    kinds: dict[str, list[TensorInfo]] = {}
    for info in infos:
        kinds.setdefault(kind_of(info), []).append(info)
    tasks = []
    for kind, members in kinds.items():
        middle = _typical(members, moments)
        shape = (middle.shape[0], middle.shape[1])
        specs = list(candidates(shape, value_bits(middle.dtype, settings)))
        for place, some in enumerate(_dealt(specs)):
            arguments = (source.store, middle, moments, [asdict(spec) for spec in some], settings.seed)
            tasks.append(Task(("shares", (kind, place)), "shares", arguments, label=f"curve of {middle.name}"))
    reaches = [
        Task(("reach", info.name), "reach", (source.store, info, moments), label=f"reach of {info.name}")
        for info in infos
    ]
    return tasks + reaches


def _typical(members: Sequence[TensorInfo], moments: Moments) -> TensorInfo:
    """The middle one of those that most tokens reached: an expert that got none says nothing of the others."""
    tokens = [moments.tokens(info.name) for info in members]
    reached = [info for info, own in zip(members, tokens, strict=True) if own == max(tokens)]
    return reached[len(reached) // 2]


def _dealt(specs: list[SwscSpec], size: int = 3) -> list[list[SwscSpec]]:
    return [specs[start : start + size] for start in range(0, len(specs), size)]
