"""How a plan gets its specs from losses that were measured before: no worker is asked."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.allocation.curves import curve_key
from pipeline.allocation.flow import allocate_plan
from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.engine.memory import Room
from pipeline.engine.stage import Stage
from pipeline.engine.task import Pool
from pipeline.errors import OutputError
from pipeline.planning.plan import Plan, make_plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import cache_name, versioned
from pipeline.storage.store import Store
from swsc_core.allocation.candidate_specs import candidates
from tests.unit.pipeline.planning.test_plan import checkpoint_of

SHAPE = (256, 128)
NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
SOURCE = checkpoint_of(dict.fromkeys(NAMES, SHAPE))


class NoPools:
    """Pools of which no stage asks for one."""

    in_process = True

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        raise AssertionError("losses are measured again")

    def require_workers(self, stage: Stage) -> None: ...

    def room(self) -> Room:
        return Room("cpu", 1 << 40)

    def release(self) -> None: ...


def measured(folder: Path, settings: CompressSettings, reach: list[float]) -> Hessians:
    """Hessians with measured losses: the `reach` of each matrix, of which a spec with more bytes leaves less."""
    hessians = Hessians(Store.at(str(folder)), 0.5)
    shares = [(asdict(spec), 1 / spec.stored_bytes(SHAPE, 16)) for spec in candidates(SHAPE, 16)]
    identity = versioned(
        "curves", {"seed": settings.seed, "matrices": NAMES, "gradient_share": 0.5, "widths": [16]}
    )  # fmt: skip
    curves = {
        "identity": identity,
        "reach": dict(zip(NAMES, reach, strict=True)),
        "shares": {curve_key(whole_matrix(SOURCE.tensors[NAMES[0]])): shares},
    }
    hessians.store.write_json(f"{cache_name('curves', identity)}.json", curves)
    return hessians


def allocated(folder: Path, reach: list[float], **given: Any) -> tuple[CompressSettings, Plan]:
    settings = CompressSettings.model_validate({"preset": "best", "projectors": "q", **given})
    plan = make_plan(SOURCE, settings)
    return settings, allocate_plan(SOURCE, plan, settings, measured(folder, settings, reach), NoPools())


def sizes(plan: Plan) -> list[int]:
    by_name = {decision.info.name: decision.stored_bytes for decision in plan.compressed}
    return [by_name[name] for name in NAMES]


def test_the_matrix_that_loses_more_gets_more_bytes_within_the_budget(tmp_path: Path) -> None:
    _, plan = allocated(tmp_path, [1.0, 50.0], bits=4)
    first, second = sizes(plan)
    assert first < second
    assert 8 * (first + second) <= 4 * 2 * SHAPE[0] * SHAPE[1]


def test_uniform_allocation_gives_alike_matrices_the_same(tmp_path: Path) -> None:
    _, plan = allocated(tmp_path, [1.0, 50.0], bits=4, allocation="uniform")
    first, second = sizes(plan)
    assert first == second <= 4 * SHAPE[0] * SHAPE[1] / 8


@pytest.mark.parametrize(("given", "rounds"), [({}, 4), ({"preset": "fast"}, 1), ({"rounds": 7}, 7)])
def test_specs_have_the_rounds_of_the_preset_unless_they_are_given(
    tmp_path: Path, given: dict[str, Any], rounds: int
) -> None:
    _, plan = allocated(tmp_path, [1.0, 2.0], bits=3, **given)
    specs: list[Any] = [spec for decision in plan.compressed for spec in decision.specs]
    assert {spec.rounds for spec in specs} == {rounds}
    assert {replace(spec, rounds=0) for spec in specs} <= set(candidates(SHAPE, 16))


def test_losses_that_are_no_numbers_are_refused_by_file(tmp_path: Path) -> None:
    settings = CompressSettings(preset="best", bits=3, projectors=("q",))
    hessians = measured(tmp_path, settings, [1.0, -float("inf")])
    with pytest.raises(OutputError, match="curves-"):
        allocate_plan(SOURCE, make_plan(SOURCE, settings), settings, hessians, NoPools())
