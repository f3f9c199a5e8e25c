"""What the verbs print about their results."""

from typing import Any

import pytest

from jobs.command_line.results import _larger_than_dense, print_compression, print_plan
from pipeline.settings.compression import CompressSettings
from pipeline.verbs.compress import CompressRequest, CompressResult
from pipeline.verbs.plan import PlanRequest, PlanResult
from tests.unit.pipeline.planning.test_plan import plan_of

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.0.self_attn.k_proj.weight": (16, 64)}


def test_a_plan_warns_of_matrices_that_grow() -> None:
    warning = _larger_than_dense(plan_of(SHAPES, rank=14))  # 14 · (16 + 64) values in place of 16 · 64
    assert "1 of 2" in warning
    assert "k_proj" in warning
    assert "instead of 16" in warning
    assert _larger_than_dense(plan_of(SHAPES, rank=4)) == ""


def test_the_time_of_a_compression_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    bits = dict.fromkeys(
        ["compressed_bits_per_weight", "share_of_weights_compressed", "whole_model_bits_per_weight"], 3.0
    )
    report = {**bits, "seconds": 1.0, "files_of_an_earlier_run": 0}
    print_compression(CompressResult(CompressRequest("model", "out"), report, [], seconds=98.7))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "98.7 s" in last
    assert "1.0 s" not in last


@pytest.mark.parametrize(("given", "limit"), [({}, False), ({"preset": "fast"}, True)])
def test_bits_that_a_calibration_chooses_are_limits(
    given: dict[str, Any], limit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    request = PlanRequest("model", CompressSettings(bits=3, **given))
    plan = plan_of(SHAPES, bits=3)
    print_plan(PlanResult(request, plan, {}, {"compressed_bits_per_weight": 3.0, "seconds": 5.0}, None))
    lines = capsys.readouterr().out.splitlines()
    assert ("compressed_bits_per_weight: at most 3.000" in lines) == limit
    assert "seconds: 5.000" in lines
