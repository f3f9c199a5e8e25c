"""Claims about plans: pure decisions from names, shapes and dtypes."""

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, ConfigError
from pipeline.planning.plan import Plan, make_plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.store import Store
from swsc_core.method.spec import RtnSpec, SwscSpec
from swsc_core.storage.safetensors_header import DTYPES

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint_of(shapes: Shapes, dtype: str = "BF16", **config: Any) -> Checkpoint:
    """A checkpoint that exists as headers only."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        nbytes = DTYPES[dtype][1]
        for side in shape:
            nbytes *= side
        tensors[name] = TensorInfo(name, dtype, shape, "model.safetensors", start, nbytes)
        start += nbytes
    return Checkpoint(Store("/nowhere"), tensors, {"model_type": "llama", **config})


LAYERS = {
    f"model.layers.{layer}.self_attn.{role}_proj.weight": (rows, 64)
    for layer in range(12)
    for role, rows in (("q", 64 + layer), ("k", 16), ("v", 16))
}
SHAPES: Shapes = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,), **LAYERS}


def plan_of(shapes: Shapes = SHAPES, dtype: str = "BF16", **settings: Any) -> Plan:
    return make_plan(checkpoint_of(shapes, dtype), CompressSettings.model_validate(settings))


def test_q_and_k_are_the_default_and_every_tensor_is_in_exactly_one_task() -> None:
    plan = plan_of()
    assert {decision.info.name.split(".")[-2] for decision in plan.compressed} == {"q_proj", "k_proj"}
    in_tasks = [info.name for task in plan.layers for info, _ in task.items]
    in_tasks += [info.name for task in plan.copies for info in task.infos]
    assert sorted(in_tasks) == sorted(SHAPES)
    files = [task.file for task in plan.layers] + [task.file for task in plan.copies]
    assert len(set(files)) == len(files) == 13
    assert all(file.endswith("-of-00013.safetensors") for file in files)


def test_tasks_are_layers_and_the_largest_comes_first() -> None:
    plan = plan_of()
    assert [task.layer for task in plan.layers] == [f"model.layers.{layer}" for layer in range(11, -1, -1)]
    assert all({layer_of(info.name) for info, _ in task.items} == {task.layer} for task in plan.layers)


def test_true_budget_counts_what_is_stored_and_paper_budget_does_not() -> None:
    true, paper = plan_of(bits=3, count="true"), plan_of(bits=3, count="paper")
    for decision in true.compressed:
        assert 8 * decision.stored_bytes <= 3 * decision.info.count
    assert all(decision.paper_bits and decision.paper_bits <= 3 for decision in paper.compressed)
    assert paper.stored_bytes > true.stored_bytes


def test_the_paper_preset_is_three_bits_as_the_paper_counts_them() -> None:
    assert plan_of() == plan_of(bits=3, count="paper")


def test_storage_dtype_decides_what_a_budget_buys() -> None:
    half, full = plan_of(dtype="F32", bits=4, storage_dtype="float16"), plan_of(dtype="F32", bits=4)
    ranks = [sum(d.specs[0].rank for d in plan.compressed if isinstance(d.specs[0], SwscSpec)) for plan in (half, full)]
    assert ranks[0] > 1.7 * ranks[1]


def test_auto_axis_offers_both_axes_at_equal_true_bits() -> None:
    decision = next(
        d for d in plan_of({"a.k_proj.weight": (512, 2048)}, channel_axis="auto", projectors="k", bits=3).compressed
    )
    assert [spec.channel_axis for spec in decision.specs if isinstance(spec, SwscSpec)] == ["output", "input"]
    one, other = (8 * spec.stored_bytes((512, 2048), 16) / (512 * 2048) for spec in decision.specs)
    assert other <= one <= other + 0.1


@pytest.mark.parametrize(("numbers", "zero"), [({"clusters": 0, "rank": 16}, "n_clusters"), ({"clusters": 16}, "rank")])
def test_auto_axis_keeps_a_zero_that_was_asked_for(numbers: dict[str, Any], zero: str) -> None:
    specs = plan_of({"a.k_proj.weight": (64, 96)}, channel_axis="auto", projectors="k", **numbers).compressed[0].specs
    assert len(specs) == 2
    assert [getattr(spec, zero) for spec in specs] == [0, 0]


def test_rtn_stores_scales_in_no_fewer_than_16_bits_even_for_fp8() -> None:
    decision = plan_of(dtype="F8_E4M3", method="rtn", bits=4).compressed[0]
    assert decision.specs == (RtnSpec(4),)
    rows, columns = decision.info.shape
    assert decision.stored_bytes == rows * columns // 2 + rows * 2 + rows // 2


def test_tied_heads_are_reported_and_kept() -> None:
    tied = make_plan(checkpoint_of(SHAPES, tie_word_embeddings=True), CompressSettings())
    assert [d.info.name for d in tied.decisions if d.action == "tied"] == ["lm_head.weight"]
    assert tied.weights == plan_of().weights
    both = make_plan(
        checkpoint_of({**SHAPES, "lm_head.weight": (100, 64)}, tie_word_embeddings=True), CompressSettings()
    )
    assert next(d for d in both.decisions if d.info.name == "lm_head.weight").action == "copied"


def test_a_projector_that_selects_nothing_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"projector gate selects no tensor; choose by --include among .*q_proj"):
        plan_of(projectors="q,gate")


def test_a_quantized_source_is_refused_with_the_remedy() -> None:
    for method, remedy in (("awq", "unquantized"), ("swsc", "restore")):
        with pytest.raises(CheckpointError, match=remedy):
            make_plan(checkpoint_of(SHAPES, quantization_config={"quant_method": method}), CompressSettings())


def test_matrices_of_a_dtype_that_is_not_compressed_are_named_where_there_are_no_others() -> None:
    with pytest.raises(ConfigError, match=r"q_proj\.weight: projector q, but F64"):
        plan_of(dtype="F64", projectors="q")
