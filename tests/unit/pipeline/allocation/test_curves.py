"""Rate–distortion curves: round trip through the cache, and the choices that follow from them."""

import json
from pathlib import Path

import pytest

from pipeline.allocation.curves import DistortionCurves, SpecDistortion, candidate_specs, curve_key
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.errors import OutputError
from pipeline.settings.compression import CompressSettings
from pipeline.storage.store import Store
from tests.unit.pipeline.planning.test_plan import checkpoint_of

SHAPE = (256, 128)
NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
INFOS = [whole_matrix(info) for info in checkpoint_of(dict.fromkeys(NAMES, SHAPE)).tensors.values()]
SETTINGS = CompressSettings.model_validate({"preset": "best", "projectors": "q", "bits": 3})


def curves() -> DistortionCurves:
    specs = list(candidate_specs(INFOS[0], SETTINGS))
    distortions = [SpecDistortion(spec, 1 / (2 + number)) for number, spec in enumerate(specs)]
    return DistortionCurves({NAMES[0]: 0.1, NAMES[1]: 3.0}, {curve_key(INFOS[0]): distortions})


def test_curves_survive_the_cache(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    curves().write(store, "curves.json", {"seed": 0})
    assert DistortionCurves.read(store, "curves.json", INFOS, SETTINGS) == curves()


def test_matrices_of_equal_role_and_shape_share_a_curve() -> None:
    assert curve_key(INFOS[0]) == curve_key(INFOS[1])


def test_a_choice_has_the_loss_of_sensitivity_times_distortion() -> None:
    losses = [[choice.loss for choice in curves().choices(info, SETTINGS)] for info in INFOS]
    assert losses[1] == pytest.approx([30 * loss for loss in losses[0]])
    assert losses[0][0] == pytest.approx(0.1 / 2)


@pytest.mark.parametrize("shares", [[], [[{"n_clusters": 3}, 0.5]]], ids=["no spec", "no candidate"])
def test_a_damaged_cache_is_refused_by_file(tmp_path: Path, shares: list[object]) -> None:
    content = {"reach": dict.fromkeys(NAMES, 1.0), "shares": {curve_key(INFOS[0]): shares}}
    (tmp_path / "curves.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"curves\.json"):
        DistortionCurves.read(Store.at(str(tmp_path)), "curves.json", INFOS, SETTINGS)
