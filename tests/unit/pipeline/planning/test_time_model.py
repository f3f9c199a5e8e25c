"""Claims about the estimated work of tasks: what is copied takes a small part of what is compressed."""

from typing import Any

import pytest

from pipeline.planning.machine_speed import Speed
from pipeline.planning.time_model import (
    copying_seconds,
    core_seconds,
    forward_seconds,
    layer_seconds,
    restoring_seconds,
)
from tests.unit.pipeline.planning.test_plan import plan_of

SPEED = Speed(gemm=5e10, additions=7e8, stream=4e8)
SHAPES = {f"model.layers.{n}.self_attn.q_proj.weight": (576, 576) for n in range(3)}


@pytest.mark.parametrize("settings", [{"bits": 3}, {"preset": "fast", "bits": 3}, {"method": "rtn", "bits": 3}])
def test_a_byte_that_is_copied_is_less_work_than_one_that_is_compressed(settings: dict[str, Any]) -> None:
    plan = plan_of(SHAPES, projectors="q", **settings)
    for layer in plan.layers:
        assert layer_seconds(layer) > 10 * copying_seconds(layer.nbytes)


def test_layers_add_up_to_the_compression() -> None:
    plan = plan_of(SHAPES, projectors="q", bits=3)
    assert sum(layer_seconds(layer, SPEED) for layer in plan.layers) == pytest.approx(core_seconds(plan, SPEED))


def test_a_weight_that_is_restored_is_more_work_than_one_that_is_copied() -> None:
    assert restoring_seconds(1000) > copying_seconds(2 * 1000)


def test_a_forward_pass_takes_two_operations_per_weight_and_token() -> None:
    assert forward_seconds(100, 10, SPEED) == pytest.approx(2 * 100 * 10 / SPEED.gemm)
