"""Claims about the estimated seconds of the stages that need a text."""

from typing import Any

import pytest

from pipeline.planning.machine_speed import Speed
from pipeline.planning.stage_seconds import stage_seconds
from pipeline.planning.time_model import core_seconds
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.compression import CompressSettings
from tests.unit.pipeline.planning.test_plan import checkpoint_of, plan_of

SPEED = Speed(gemm=5e10, additions=7e8, stream=4e8)
SHAPES = {f"model.layers.{n}.self_attn.{role}_proj.weight": (576, 576) for n in range(4) for role in "qk"}
SHAPES["model.embed_tokens.weight"] = (10_000, 576)


def seconds(windows: int = 32, **settings: Any) -> dict[str, float]:
    chosen = CompressSettings.model_validate(settings)
    calibration = CalibrationSettings(calibration_windows=windows)
    return stage_seconds(checkpoint_of(SHAPES), plan_of(SHAPES, **settings), chosen, calibration, SPEED)


def test_a_form_that_needs_no_text_has_no_other_stage() -> None:
    assert seconds(bits=3) == {}


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"preset": "fast"}, {"calibrate", "curves"}),
        ({"preset": "best"}, {"calibrate", "curves", "tune"}),
        ({"preset": "data-free"}, {"write_text", "calibrate", "curves", "tune"}),
        ({"tune": 1}, {"tune"}),
    ],
)
def test_each_stage_of_a_preset_takes_time(settings: dict[str, Any], stages: set[str]) -> None:
    estimated = seconds(bits=3, **settings)
    assert estimated.keys() == stages
    assert min(estimated.values()) > 0


def test_calibration_and_tuning_take_time_by_their_tokens() -> None:
    few, many = (seconds(windows, preset="best", bits=3) for windows in (32, 128))
    for stage in ("calibrate", "tune"):
        assert many[stage] == pytest.approx(4 * few[stage])
    assert many["curves"] == few["curves"]


def test_the_rounds_of_a_preset_count_before_the_allocation() -> None:
    best, fast = (core_seconds(plan_of(SHAPES, preset=preset, bits=3), SPEED) for preset in ("best", "fast"))
    assert best > fast > core_seconds(plan_of(SHAPES, preset="fast", bits=3, rounds=0), SPEED)
