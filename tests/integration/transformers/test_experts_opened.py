"""Mixtures of experts opened by transformers.

Experts stay compressed, dense ones beside them, and are saved as they were.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

import swsc_core.hf.lora  # noqa: F401  # puts adapters on compressed layers
from jobs.cli import main
from swsc_core import SwscLinear
from tests.support.families import MODELS, FamilyModel, experts_of, tensors_of

EXPERTS = ("--projectors", "experts")
_WIDTHS = ("--centroid-bits", "8", "--factor-bits", "8")
FORMS = {
    "segments": ("--clusters", "16", "--segment-size", "4", "--scaled"),
    "few bits": (*_WIDTHS, "--segment-size", "4", "--clusters", "16", "--rank", "2"),
    "round to nearest": ("--method", "rtn", "--bits", "4", "--granularity", "channel"),
}
MIXED = {
    "one expert in two": r"experts\.[02]\.",
    "down alone": r"experts\.\d+\.(w2|down_proj)",
    "up alone": r"experts\.\d+\.(w3|up_proj)",
    "one layer": r"layers\.1\..*experts",
    "one matrix": r"layers\.1\..*experts\.3\.(w1|gate_proj)",
}


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "deepseek_v3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    return FamilyModel(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    return FamilyModel("mixtral", tmp_path_factory.mktemp("mixtral"))


def held(model: Any) -> int:
    """Bytes in memory without tables of positions, which no file holds."""
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def test_a_model_is_as_large_as_its_files(family: FamilyModel) -> None:
    model = family.load(family.compressed)
    assert held(model) == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors_of(family.compressed).values()
    )
    assert held(model) < held(family.load(family.restored(family.compressed))) / 2


def test_every_expert_is_compressed_by_itself(family: FamilyModel) -> None:
    found = [layer for stack in experts_of(family.load(family.compressed)) for layer in stack.modules()]
    expected = [name for name in tensors_of(family.dense) if ".experts." in name]
    assert sum(isinstance(layer, SwscLinear) for layer in found) == len(expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_logits_of_the_restored_model(mixtral: FamilyModel, form: str) -> None:
    compressed = mixtral.folder / form
    if not compressed.exists():
        assert main(["compress", str(mixtral.dense), str(compressed), "--local", *EXPERTS, *FORMS[form]]) == 0
    model = mixtral.load(compressed)
    assert len(experts_of(model)) == 2
    assert mixtral.off(model, mixtral.load(mixtral.restored(compressed))) <= 1e-5


_SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
_FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 48, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**_SIZES, **_FEW)),
    "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**_SIZES, num_local_experts=4)),
    "glm4_moe": lambda: t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**_SIZES, **_ROUTED, first_k_dense_replace=1)),
    "dots1": lambda: t.Dots1ForCausalLM(t.Dots1Config(**_SIZES, **_ROUTED, first_k_dense_replace=1)),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeForCausalLM(
        t.Ernie4_5_MoeConfig(
            **_SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1,
            moe_layer_start_index=0,
        )
    ),
    "nemotron_h, without gates": lambda: t.NemotronHForCausalLM(
        t.NemotronHConfig(
            **_SIZES, **_ROUTED, moe_shared_expert_intermediate_size=48, layers_block_type=["attention", "moe"]
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_open_as_well(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, name, OTHERS[name])
    family = FamilyModel(name, tmp_path)
    compressed = family.compress("compressed", "--include", r"experts\.[0-2]\.")
    model, restored = family.load(compressed), family.load(family.restored(compressed))
    assert experts_of(model)
    assert held(model) == sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(compressed).values())
    assert family.off(model, restored) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(compressed).keys()
    assert torch.equal(family.logits(family.load(tmp_path / "saved")), family.logits(model))
    model.dequantize()
    assert torch.equal(family.logits(model), family.logits(restored))


@pytest.mark.parametrize("what", MIXED)
def test_dense_matrices_stand_beside_compressed_ones(family: FamilyModel, what: str, tmp_path: Path) -> None:
    compressed = family.compress(what, "--include", MIXED[what])
    model = family.load(compressed)
    assert experts_of(model)
    assert held(model) == sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(compressed).values())
    assert family.off(model, family.load(family.restored(compressed))) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(compressed).keys()
    assert torch.equal(family.logits(family.load(tmp_path / "saved")), family.logits(model))
    model.dequantize()
    assert not experts_of(model)
    assert torch.equal(family.logits(model), family.logits(family.load(family.restored(compressed))))


def test_saved_again_every_tensor_is_the_same_to_the_byte(family: FamilyModel, tmp_path: Path) -> None:
    family.load(family.compressed).save_pretrained(tmp_path / "saved")
    before, after = tensors_of(family.compressed), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dequantized_and_saved_it_is_the_restored_checkpoint(family: FamilyModel, tmp_path: Path) -> None:
    model = family.load(family.compressed)
    model.dequantize()
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(family.restored(family.compressed)), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_are_calculated_one_by_one_and_dequantized_as_before(family: FamilyModel) -> None:
    model = family.load(family.compressed)
    assert set(model.get_experts_implementation().values()) == {"eager"}
    model.dequantize()
    expected = family.load(family.restored(family.compressed)).get_experts_implementation()
    assert model.get_experts_implementation() == expected


def test_a_config_that_was_loaded_before_opens_it_again(mixtral: FamilyModel) -> None:
    model = mixtral.load(mixtral.compressed)
    assert torch.equal(mixtral.logits(mixtral.load(mixtral.compressed, config=model.config)), mixtral.logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_opens_in_any_dtype(family: FamilyModel, dtype: torch.dtype) -> None:
    restored = family.restored(family.compressed)
    whole = {"num_experts_per_tok": 4}  # all of them: in 16 bits a token may otherwise be routed to another expert
    expected = family.logits(family.load(restored, **whole))
    model = family.load(family.compressed, dtype=dtype, **whole)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {
        p.dtype for p in family.load(restored, dtype=dtype).parameters()
    }
    error, usual = (
        (family.logits(one).float() - expected).norm() / expected.norm()
        for one in (model, family.load(restored, dtype=dtype, **whole))
    )
    assert error < 2 * usual + 1e-5


def test_gradients_reach_the_input_as_they_do_in_the_restored_model(mixtral: FamilyModel) -> None:
    found = []
    for directory in (mixtral.compressed, mixtral.restored(mixtral.compressed)):
        model = mixtral.load(directory)
        x = model.get_input_embeddings()(torch.arange(1, 25)[None]).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm() > 0


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_it_opens_by_a_device_map(mixtral: FamilyModel, device_map: Any) -> None:
    model = mixtral.load(mixtral.compressed, device_map=device_map)
    assert torch.equal(mixtral.logits(model), mixtral.logits(mixtral.load(mixtral.compressed)))


def test_layers_may_be_offloaded_to_disk(mixtral: FamilyModel, tmp_path: Path) -> None:
    here = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map = here | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = mixtral.load(mixtral.compressed, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert torch.equal(mixtral.logits(model), mixtral.logits(mixtral.load(mixtral.compressed)))


def test_a_copy_and_a_pickle_give_the_same(mixtral: FamilyModel, tmp_path: Path) -> None:
    model = mixtral.load(mixtral.compressed)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(mixtral.logits(other), mixtral.logits(model))
        other.set_experts_implementation("batched_mm")  # the config that it looks at is its own
        with pytest.raises(ValueError, match="batched_mm"):
            mixtral.logits(other)
    mixtral.logits(model)


def test_the_model_without_its_head_opens_too(mixtral: FamilyModel) -> None:
    with torch.no_grad():
        ids = torch.arange(1, 25)[None]
        whole, bare = mixtral.load(mixtral.compressed), AutoModel.from_pretrained(mixtral.compressed)
        assert len(experts_of(bare)) == 2
        assert torch.equal(bare(ids).last_hidden_state, whole.model(ids).last_hidden_state)


ADAPTED: dict[str, tuple[str, list[str] | str]] = {
    "attention": ("mixtral", ["q_proj", "o_proj"]),
    "attention of DeepSeek": ("deepseek_v3", ["q_a_proj", "o_proj"]),
    "shared experts": ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"]),
    "everything linear": ("qwen2_moe", "all-linear"),
}


@pytest.mark.parametrize("flags", [("--projectors", "q,o,experts"), ("--include", MIXED["one expert in two"])], ids=str)
@pytest.mark.parametrize("what", ADAPTED)
def test_adapters_attach_to_the_same_layers_as_in_the_restored_model(
    what: str, flags: tuple[str, str], tmp_path: Path
) -> None:
    kind, targets = ADAPTED[what]
    family = FamilyModel(kind, tmp_path)
    compressed = family.compress("compressed", *flags)
    found = []
    for directory in (compressed, family.restored(compressed)):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights="orthogonal")
        found.append(get_peft_model(family.load(directory), config))
    names = [{name for name in model.state_dict() if "lora_" in name} for model in found]
    assert names[0] == names[1]
    assert not any(".experts." in name for name in names[0])
    assert family.off(found[0], found[1]) <= 1e-5
    found[0].save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(family.load(compressed), tmp_path / "adapter")
    assert torch.equal(family.logits(loaded), family.logits(found[0]))
