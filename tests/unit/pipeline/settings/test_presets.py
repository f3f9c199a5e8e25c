"""What presets mean, and which settings go with them."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.settings.compression import CompressSettings
from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.presets import BEST, DATA_FREE, FAST, PAPER, PRESETS
from pipeline.settings.sweep import SweepSettings, Variant


def settings(**given: Any) -> MatrixSettings:
    return MatrixSettings.model_validate(given)


def test_every_value_of_the_setting_is_a_preset_and_its_fields_are_settings() -> None:
    assert set(PRESETS) == set(get_args(MatrixSettings.model_fields["preset"].annotation))
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.chooses | preset.ignores <= MatrixSettings.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "calibrated", "rounds", "epochs"),
    [("paper", False, 0, 0), ("fast", True, 1, 0), ("best", True, 4, 1), ("data-free", True, 4, 1)],
)
def test_presets_as_documented(name: str, calibrated: bool, rounds: int, epochs: int) -> None:
    chosen = settings(preset=name, bits=3)
    assert (chosen.needs_calibration, chosen.max_rounds, chosen.epochs) == (calibrated, rounds, epochs)
    assert chosen.needs_hessians == chosen.preset_definition.allocates == calibrated


def test_rounds_and_epochs_that_are_given_count() -> None:
    chosen = settings(preset="best", bits=3, rounds=0, tune=0)
    assert (chosen.max_rounds, chosen.epochs) == (0, 0)
    assert settings(tune=2).needs_calibration


def test_only_the_preset_of_the_paper_has_a_budget_of_its_own() -> None:
    assert settings().budget_bits == PAPER.bits == 3
    assert settings(bits=2).budget_bits == 2
    for preset in (BEST, FAST, DATA_FREE):
        with pytest.raises(ValidationError, match="bits"):
            settings(preset=preset.name)


@pytest.mark.parametrize("preset", [BEST, FAST, DATA_FREE])
@pytest.mark.parametrize("field", sorted(BEST.chooses))
def test_what_a_preset_chooses_cannot_be_given(preset: Any, field: str) -> None:
    value = {"channel_axis": "input", "count": "true", "metric": "weights", "cluster_share": 0.5}.get(field, 4)
    with pytest.raises(ValidationError, match=field):
        settings(preset=preset.name, bits=3, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("bits_over", "model"), ("allocation", "uniform")])
def test_what_the_paper_has_no_use_for_cannot_be_given_with_it(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=field):
        settings(bits=3, **{field: value})
    assert getattr(settings(preset="fast", bits=3, **{field: value}), field) == value


@pytest.mark.parametrize("preset", [BEST, FAST, DATA_FREE])
def test_round_to_nearest_has_the_plain_preset_alone(preset: Any) -> None:
    assert settings(method="rtn").budget_bits == 3
    with pytest.raises(ValidationError, match="preset"):
        settings(method="rtn", preset=preset.name, bits=3)


def test_a_preset_that_generates_its_text_is_calibrated_without_one() -> None:
    variants = [Variant(name=name, preset=name, bits=3) for name in ("best", "data-free")]
    sweep = SweepSettings(variants=tuple(variants), calibration="text")
    assert [sweep.calibration_of(variant).calibration for variant in variants] == ["text", None]
    with pytest.raises(ValidationError, match="calibration"):
        SweepSettings(variants=tuple(variants))
    SweepSettings(variants=tuple(variants[1:]))


def test_the_settings_of_a_compression_have_the_same_presets() -> None:
    assert CompressSettings(preset="best", bits=3).preset_definition is BEST
