"""Claims about the memory of workers: which parts it has, and on which side of a GPU they are."""

from typing import Any

import pytest

from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.engine.memory import WorkerMemory
from pipeline.models.stored_model import Model
from pipeline.planning.memory import (
    WORKER_BASE,
    block_memory,
    calibration_memory,
    compression_memory,
    copying_memory,
    evaluation_memory,
    hessian_bytes,
    layer_compression_memory,
    restoring_memory,
    tuning_memory,
)
from tests.unit.pipeline.planning.test_plan import Shapes, checkpoint_of, plan_of
from tests.unit.pipeline.planning.test_tasks import fused_plan

SQUARE = {"model.layers.0.self_attn.q_proj.weight": (2048, 2048)}
WEIGHTS = 1_000_000


def model_of(dtype: str = "BF16", shape: tuple[int, int] = (1000, 1000), **config: Any) -> Model:
    return Model(checkpoint_of({"w": shape}, dtype, **config), {})


def test_a_worker_on_a_cpu_converts_weights_to_float32_and_holds_both_while_loading() -> None:
    memory = evaluation_memory(model_of(), "auto", 100) - WORKER_BASE
    assert memory.cpu == WEIGHTS * (4 + 2)
    assert (evaluation_memory(model_of(), "bfloat16", 100) - WORKER_BASE).cpu == WEIGHTS * 2


def test_a_worker_with_a_gpu_holds_the_weights_there_and_one_file_in_host_memory() -> None:
    memory, base = evaluation_memory(model_of(), "auto", 100), evaluation_memory(model_of(shape=(1, 0)), "auto", 100)
    assert memory.device - base.device == WEIGHTS * 2
    assert memory.host - base.host == WEIGHTS * 2, "the only file"
    converted = evaluation_memory(model_of("F32"), "bfloat16", 100)
    assert converted.host - base.host == WEIGHTS * (4 + 2), "the file, and the weights in the other dtype"


def test_the_logits_count_once_the_model_is_loaded() -> None:
    tokens, vocabulary = 2048, 100_000
    memory = evaluation_memory(model_of(vocab_size=vocabulary), "auto", tokens) - WORKER_BASE
    assert memory.cpu == 4 * WEIGHTS + vocabulary * (4 * tokens + 8 * 512)


def test_the_vocabulary_of_a_multimodal_model_is_that_of_its_text_part() -> None:
    nested = model_of(shape=(1, 0), text_config={"vocab_size": 1000})
    assert evaluation_memory(nested, "auto", 10) == evaluation_memory(
        model_of(shape=(1, 0), vocab_size=1000), "auto", 10
    )


def test_a_block_needs_hidden_states_before_and_after_it() -> None:
    model = model_of(hidden_size=64)
    few, many = (block_memory(model, "float32", 10, tokens) for tokens in (10, 110))
    assert many.cpu - few.cpu == many.host - few.host == many.device - few.device == 2 * 100 * 64 * 4


@pytest.mark.parametrize("config", [{"num_hidden_layers": 12, "hidden_size": 768}, {"n_layer": 12, "n_embd": 768}])
def test_calibration_holds_the_activations_of_all_layers_whatever_the_config_calls_them(config: dict[str, Any]) -> None:
    none, model = model_of(shape=(1, 0)), model_of(shape=(1, 0), **config)
    grown = calibration_memory(model, 512, 0, "auto") - calibration_memory(none, 512, 0, "auto")
    assert grown.cpu == grown.device == 4 * 512 * 12 * (10 * 768 + 4 * 4 * 768)
    assert grown.host == 0


def test_hessians_of_a_calibration_are_on_the_device_and_return_to_the_host() -> None:
    model = model_of(vocab_size=10_000)
    sums = calibration_memory(model, 512, 10**9, "auto") - calibration_memory(model, 512, 0, "auto")
    assert sums.host == sums.device == 10**9


def test_tuning_holds_a_second_model() -> None:
    model = model_of(vocab_size=10_000)
    tuning, calibration = (memory(model) for memory in (tuning_of, calibration_of))
    assert tuning.device - calibration.device >= 2 * WEIGHTS
    assert tuning.cpu - calibration.cpu >= 4 * WEIGHTS


def tuning_of(model: Model) -> Any:
    return tuning_memory(model, 512, "auto")


def calibration_of(model: Model) -> Any:
    return calibration_memory(model, 512, 0, "auto")


def test_hessians_take_memory_beside_the_matrices() -> None:
    plain, metric = (
        compression_memory(plan_of(SQUARE, projectors="q", clusters=64, metric=m)) for m in ("weights", "activations")
    )
    assert metric.cpu - plain.cpu == metric.device - plain.device == 2 * 4 * 2048**2  # the Hessian and its root
    assert metric.host == plain.host


def test_segments_are_compressed_in_less_memory_than_whole_channels() -> None:
    whole, segmented = (
        compression_memory(plan_of(SQUARE, projectors="q", clusters=64, segment_size=size)) for size in (None, 4)
    )
    assert segmented.cpu < whole.cpu


def test_restoring_collects_the_tensors_of_a_file() -> None:
    assert restoring_memory(1000, 10**9).cpu - restoring_memory(1000, 0).cpu == 10**9


def test_a_worker_holds_the_file_that_it_computes() -> None:
    """In the dense form, also the matrices of a fused tensor while it is assembled."""
    plan = plan_of(SQUARE, projectors="q", bits=3)
    collected = layer_compression_memory(plan) - compression_memory(plan)
    assert collected == WorkerMemory(*[plan.compressed[0].stored_bytes] * 2)
    fused = fused_plan(True)
    largest = max(tensor.tensor.nbytes for layer in fused.layers for tensor in layer.fused)
    collected = layer_compression_memory(fused) - compression_memory(fused)
    assert collected.cpu == fused.largest_file_bytes + 2 * largest


def test_copies_are_streamed_unless_they_are_dequantized() -> None:
    plan = plan_of(SQUARE | {"model.embed_tokens.weight": (32000, 2048)}, projectors="q", bits=3)
    assert copying_memory(plan) == WORKER_BASE


def test_a_matrix_with_an_input_of_its_own_holds_two_hessians() -> None:
    widths = {"q_proj": 64, "k_proj": 64, "down_proj": 96}
    shapes: Shapes = {f"model.layers.{n}.x.{name}.weight": (32, w) for name, w in widths.items() for n in (0, 1)}
    matrices = [whole_matrix(info) for info in checkpoint_of(shapes).tensors.values()]
    # Q and K share the Hessian of their input.
    assert hessian_bytes(matrices) == 2 * 4 * (3 * 64**2 + 2 * 96**2)
