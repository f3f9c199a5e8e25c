"""Claims about cost estimates: monotony, and exactness of the parts that are certain."""

from typing import Any

import pytest

from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.models.stored_model import Model
from pipeline.planning.cost_model import (
    WORKER_BASE,
    calibration_bytes,
    compression_bytes,
    copying_bytes,
    estimate_cost,
    evaluation_bytes,
    hessian_bytes,
    layer_compression_bytes,
    restoring_bytes,
)
from pipeline.planning.machine_speed import Speed
from pipeline.planning.time_model import core_seconds
from swsc_core.compressed.entry import RtnEntry
from tests.unit.pipeline.planning.test_plan import Shapes, checkpoint_of, plan_of
from tests.unit.pipeline.planning.test_tasks import fused_plan

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


def test_a_worker_holds_the_file_that_it_computes() -> None:
    """In the dense form, also the matrices of a fused tensor while it is assembled."""
    plan = plan_of(SQUARE, projectors="q", bits=3)
    assert layer_compression_bytes(plan) - compression_bytes(plan) == plan.compressed[0].stored_bytes
    fused = fused_plan(True)
    largest = max(tensor.tensor.nbytes for layer in fused.layers for tensor in layer.fused)
    assert layer_compression_bytes(fused) - compression_bytes(fused) == fused.largest_file_bytes + 2 * largest


def test_copies_are_streamed_unless_they_are_dequantized() -> None:
    plan = plan_of(SQUARE | {"model.embed_tokens.weight": (32000, 2048)}, projectors="q", bits=3)
    assert copying_bytes(plan) == WORKER_BASE


def test_restoring_holds_the_file_that_it_computes() -> None:
    entry = RtnEntry((1000, 1000), "bfloat16", 2, "channel", True)
    model = Model(checkpoint_of({"w": (1000, 1000)}), {"w": entry})
    assert restoring_bytes(model, 3000) - restoring_bytes(model, 1000) == 2000


def test_evaluation_holds_the_weights_as_read_and_as_calculated_with_and_the_logits() -> None:
    model = Model(checkpoint_of({"w": (1000, 1000)}, vocab_size=50_000), {})
    none = Model(checkpoint_of({"w": (1, 0)}), {})
    base = evaluation_bytes(none, "auto", 100)
    assert evaluation_bytes(model, "auto", 100) - base == 1_000_000 * (2 + 4) + 100 * 50_000 * (4 + 4)
    assert evaluation_bytes(model, "bfloat16", 100) - base == 1_000_000 * (2 + 2) + 100 * 50_000 * (2 + 4)


def test_the_vocabulary_of_a_multimodal_model_is_that_of_its_text_part() -> None:
    nested = Model(checkpoint_of({"w": (1, 0)}, text_config={"vocab_size": 1000}), {})
    plain = Model(checkpoint_of({"w": (1, 0)}, vocab_size=1000), {})
    assert evaluation_bytes(nested, "auto", 10) == evaluation_bytes(plain, "auto", 10)


def test_hessians_take_memory_beside_the_matrices() -> None:
    plain, metric = (plan_of(SQUARE, projectors="q", clusters=64, metric=m) for m in ("weights", "activations"))
    extra = (
        estimate_cost(metric, "swsc", SPEED, 2)["worker_peak_bytes"]
        - estimate_cost(plain, "swsc", SPEED, 2)["worker_peak_bytes"]
    )
    assert extra == 2 * 4 * 2048**2  # the Hessian and its root


def test_a_matrix_with_an_input_of_its_own_holds_two_hessians() -> None:
    widths = {"q_proj": 64, "k_proj": 64, "down_proj": 96}
    shapes = {f"model.layers.{n}.x.{name}.weight": (32, w) for name, w in widths.items() for n in (0, 1)}
    matrices = [whole_matrix(info) for info in checkpoint_of(shapes).tensors.values()]
    assert hessian_bytes(matrices) == 2 * 4 * (
        3 * 64**2 + 2 * 96**2
    )  # by layers; Q and K share the Hessian of their input


def test_segments_are_worked_through_in_less_memory_than_whole_channels() -> None:
    whole, segmented = (plan_of(SQUARE, projectors="q", clusters=64, segment_size=size) for size in (None, 4))
    assert (
        estimate_cost(segmented, "swsc", SPEED, 2)["worker_peak_bytes"]
        < estimate_cost(whole, "swsc", SPEED, 2)["worker_peak_bytes"]
    )


def test_calibration_holds_the_activations_of_all_layers_whatever_the_config_calls_them() -> None:
    configs: list[dict[str, Any]] = [{}, {"num_hidden_layers": 12, "hidden_size": 768}, {"n_layer": 12, "n_embd": 768}]
    none, llama, gpt2 = (checkpoint_of({"w": (1, 0)}, **config) for config in configs)
    assert calibration_bytes(llama, 512, 0) - calibration_bytes(none, 512, 0) == 4 * 512 * 12 * 24 * 768
    assert calibration_bytes(gpt2, 512, 0) == calibration_bytes(llama, 512, 0)


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
