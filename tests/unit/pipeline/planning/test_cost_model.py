"""Claims about cost estimates: monotony, and exactness of the parts that are certain."""

from typing import Any

import pytest

from pipeline.planning.cost_model import estimate_cost
from pipeline.planning.machine_speed import Speed
from pipeline.planning.time_model import core_seconds
from tests.unit.pipeline.planning.test_plan import Shapes, plan_of

SPEED = Speed(gemm=5e10, additions=7e8, stream=4e8)
SQUARE = {"model.layers.0.self_attn.q_proj.weight": (2048, 2048)}


def seconds(shapes: Shapes = SQUARE, **settings: Any) -> float:
    return core_seconds(plan_of(shapes, projectors="q", **settings), SPEED)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"clusters": 64, "rank": 0}, {"clusters": 64, "rank": 64}),
        ({"clusters": 0, "rank": 64}, {"clusters": 64, "rank": 64}),
        ({"clusters": 64, "rank": 8, "n_init": 4}, {"clusters": 64, "rank": 8, "n_init": 16}),
        ({"clusters": 64, "rank": 8}, {"clusters": 64, "rank": 8, "channel_axis": "auto"}),
        ({"clusters": 16, "segment_size": 4}, {"clusters": 256, "segment_size": 4}),
        ({"clusters": 64, "segment_size": 4}, {"clusters": 64, "segment_size": 4, "metric": "activations"}),
        (
            {"clusters": 64, "segment_size": 4, "metric": "activations"},
            {"clusters": 64, "segment_size": 4, "metric": "activations", "rounds": 3},
        ),
        ({"preset": "fast", "bits": 2}, {"preset": "fast", "bits": 2.5}),
    ],
)
def test_more_work_is_predicted_to_take_longer(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert seconds(**less) < seconds(**more)


def test_twice_the_layers_take_twice_the_time_and_no_more_memory() -> None:
    twice = SQUARE | {"model.layers.1.self_attn.q_proj.weight": (2048, 2048)}
    assert seconds(twice, bits=3) == pytest.approx(2 * seconds(bits=3))
    one, two = (estimate_cost(plan_of(shapes, projectors="q", bits=3), "swsc", SPEED, 2) for shapes in (SQUARE, twice))
    assert one["worker_peak_bytes"] == two["worker_peak_bytes"]
    assert two["output_bytes"] == 2 * one["output_bytes"]


def test_dense_output_is_predicted_at_its_full_size() -> None:
    assert estimate_cost(plan_of(SQUARE, projectors="q", bits=3), "dense", SPEED, 2)["output_bytes"] == 2 * 2048**2


def test_time_is_shared_by_workers_down_to_what_the_largest_layer_takes_alone() -> None:
    layers = {f"model.layers.{n}.self_attn.q_proj.weight": (2048, 2048) for n in range(8)}
    plan = plan_of(layers | {"model.embed_tokens.weight": (32000, 2048)}, projectors="q", bits=3)
    seconds = [estimate_cost(plan, "swsc", SPEED, workers)["seconds"] - 10.0 for workers in (1, 2, 8, 100)]
    assert seconds[1] == pytest.approx(seconds[0] / 2)
    assert seconds[2] < seconds[1]
    assert seconds[3] == pytest.approx(core_seconds(plan, SPEED) / 8)


def test_what_is_copied_takes_time_by_its_bytes() -> None:
    q = {"model.layers.0.self_attn.q_proj.weight": (512, 512)}
    small, large = (
        estimate_cost(plan_of(q | {"model.embed_tokens.weight": (rows, 512)}, projectors="q", bits=3), "swsc", SPEED, 1)
        for rows in (1000, 11000)
    )
    assert large["core_seconds"] - small["core_seconds"] == pytest.approx(2 * 512 * 10000 / SPEED.stream)
