"""Mixtures of experts opened by transformers: experts stay compressed, beside dense ones too, or are said not to be."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import swsc_core.hf.lora  # noqa: F401  # puts adapters on compressed layers
from jobs.cli import main
from swsc_core import SwscExperts, SwscLinear
from swsc_core.format import part_name
from swsc_core.hf.experts import lay_apart
from swsc_core.hf.names import Names
from tests.families import FamilyModel, tensors_of

EXPERTS = ("--projectors", "experts")
FORMS = {
    "segments": ("--clusters", "16", "--segment-size", "4", "--scaled"),
    "few bits": ("--centroid-bits", "8", "--factor-bits", "8", "--segment-size", "4", "--clusters", "16"),
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


@pytest.fixture
def place(mixtral: FamilyModel, tmp_path: Path) -> Path:
    """A copy of a compressed directory, to be damaged."""
    return Path(shutil.copytree(mixtral.compressed, tmp_path / "model"))


def stacks(model: Any) -> list[SwscExperts]:
    return [module for module in model.modules() if isinstance(module, SwscExperts)]


def held(model: Any) -> int:
    """Bytes that lie in memory, but for tables of positions, which no file holds."""
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def off(family: FamilyModel, first: Any, second: Any) -> float:
    wanted = family.logits(second)
    return float((family.logits(first) - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def test_a_model_is_as_large_as_its_files(family: FamilyModel) -> None:
    model = family.load(family.compressed)
    assert held(model) == sum(t.numel() * t.element_size() for t in tensors_of(family.compressed).values())
    assert held(model) < held(family.load(family.restored(family.compressed))) / 2


def test_every_expert_is_compressed_by_itself(family: FamilyModel) -> None:
    found = [layer for stack in stacks(family.load(family.compressed)) for layer in stack.modules()]
    wanted = [name for name in tensors_of(family.dense) if ".experts." in name]
    assert sum(isinstance(layer, SwscLinear) for layer in found) == len(wanted)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_what_the_restored_model_says(mixtral: FamilyModel, form: str) -> None:
    compressed = mixtral.folder / form
    if not compressed.exists():
        assert main(["compress", str(mixtral.dense), str(compressed), "--local", *EXPERTS, *FORMS[form]]) == 0
    model = mixtral.load(compressed)
    assert len(stacks(model)) == 2
    assert off(mixtral, model, mixtral.load(mixtral.restored(compressed))) <= 1e-5


@pytest.mark.parametrize("what", MIXED)
def test_dense_matrices_stand_beside_compressed_ones(family: FamilyModel, what: str, tmp_path: Path) -> None:
    compressed = family.compress(what, "--include", MIXED[what])
    model = family.load(compressed)
    assert stacks(model)
    assert held(model) == sum(t.numel() * t.element_size() for t in tensors_of(compressed).values())
    assert off(family, model, family.load(family.restored(compressed))) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(compressed).keys()
    assert torch.equal(family.logits(family.load(tmp_path / "saved")), family.logits(model))
    model.dequantize()
    assert not stacks(model)
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
    wanted = family.load(family.restored(family.compressed)).get_experts_implementation()
    assert model.get_experts_implementation() == wanted


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_another_implementation_is_refused_by_name(mixtral: FamilyModel, implementation: str) -> None:
    said = f"experts_implementation '{implementation}' wants the experts .* leave it out"
    with pytest.raises(ValueError, match=said):
        mixtral.load(mixtral.compressed, experts_implementation=implementation)
    model = mixtral.load(mixtral.compressed, experts_implementation="eager")
    model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=said):
        mixtral.logits(model)


def test_a_config_that_was_loaded_before_opens_it_again(mixtral: FamilyModel) -> None:
    model = mixtral.load(mixtral.compressed)
    assert torch.equal(mixtral.logits(mixtral.load(mixtral.compressed, config=model.config)), mixtral.logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_opens_in_any_dtype(family: FamilyModel, dtype: torch.dtype) -> None:
    restored = family.restored(family.compressed)
    wanted = family.logits(family.load(restored))
    model = family.load(family.compressed, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {
        p.dtype for p in family.load(restored, dtype=dtype).parameters()
    }
    error = (family.logits(model).float() - wanted).norm() / wanted.norm()
    usual = (family.logits(family.load(restored, dtype=dtype)).float() - wanted).norm() / wanted.norm()
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


def test_layers_may_lie_on_disk(mixtral: FamilyModel, tmp_path: Path) -> None:
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
        assert len(stacks(bare)) == 2
        assert torch.equal(bare(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "targets", [["q_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str
)
@pytest.mark.parametrize("what", ["everything", "one expert in two"])
def test_adapters_come_to_lie_where_they_do_in_the_restored_model(
    family: FamilyModel, targets: Any, what: str, tmp_path: Path
) -> None:
    if family.name != "qwen2_moe" and targets != ["q_proj", "o_proj"]:
        pytest.skip("PEFT means experts by it")
    compressed = (
        family.compressed if what == "everything" else family.compress(f"lora {what}", "--include", MIXED[what])
    )
    found = []
    for directory in (compressed, family.restored(compressed)):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights="orthogonal", lora_dropout=0.0)
        found.append(get_peft_model(family.load(directory), config))
    names = [{name for name in model.state_dict() if "lora_" in name} for model in found]
    assert names[0] == names[1]
    assert not any(".experts." in name for name in names[0])
    assert off(family, found[0], found[1]) <= 1e-5
    found[0].save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(family.load(compressed), tmp_path / "adapter")
    assert torch.equal(family.logits(loaded), family.logits(found[0]))


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["w1", "w2", "w3"]}, {"target_modules": "all-linear"}, {"target_parameters": ["experts.down_proj"]}],
    ids=str,
)  # fmt: skip
def test_adapters_on_experts_are_refused_by_name(mixtral: FamilyModel, targets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"down_proj.* of the experts, which stay compressed and take no adapters"):
        get_peft_model(mixtral.load(mixtral.compressed), LoraConfig(r=2, **targets))


def changed(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = next(file for file in sorted(directory.glob("*.safetensors")) if name in load_file(file))
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
LABELS, LEFT = part_name(W1, "labels"), part_name(W1, "left")
DAMAGES = {
    "a part is missing": (LABELS, lambda t: t.pop(LABELS), "experts.2.w1.labels is missing"),
    "a part of another shape": (LEFT, lambda t: t.update({LEFT: t[LEFT][:, :-1].contiguous()}), "experts.2.w1.left is F32"),
    "a part of another kind": (LABELS, lambda t: t.update({LABELS: t[LABELS].float()}), "experts.2.w1.labels is F32"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_of_an_expert_are_refused_by_name(place: Path, mixtral: FamilyModel, damage: str) -> None:
    name, change, said = DAMAGES[damage]
    changed(place, name, change)
    with pytest.raises(ValueError, match=said):
        mixtral.load(place)


def test_a_label_out_of_range_is_refused_by_name(mixtral: FamilyModel, tmp_path: Path) -> None:
    place = tmp_path / "model"
    assert (
        main(["compress", str(mixtral.dense), str(place), "--local", *EXPERTS, "--clusters", "5", "--rank", "1"]) == 0
    )
    changed(place, LABELS, lambda t: t[LABELS].fill_(255))
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.2.w1: label 7 is out of range for 5 centroids"):
        mixtral.load(place)


def test_a_dense_expert_that_is_missing_is_refused_by_name(mixtral: FamilyModel, tmp_path: Path) -> None:
    place = Path(shutil.copytree(mixtral.compress("some", "--include", r"experts\.[01]\."), tmp_path / "model"))
    changed(place, W1, lambda t: t.pop(W1))
    with pytest.raises(ValueError, match=r"nothing is stored for model.layers.1.mlp.experts.2.w1.weight"):
        mixtral.load(place)


def test_an_expert_of_another_size_is_refused_by_name(place: Path, mixtral: FamilyModel) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"experts.0.w1.weight is \[128, 64\] in this model.*\[96, 64\] in its entry"):
        mixtral.load(place)


class OwnForward(MixtralExperts):
    """Experts whose forward pass is no one's but theirs."""

    def forward(self, *_: Any) -> Any:
        raise NotImplementedError


def empty(family: FamilyModel) -> Any:
    config = MixtralConfig.from_pretrained(family.dense)
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def test_experts_whose_forward_pass_is_their_own_are_not_laid_apart(mixtral: FamilyModel) -> None:
    names = [name for name in tensors_of(mixtral.dense) if ".experts." in name]
    model = empty(mixtral)
    for layer in model.model.layers[1:]:
        layer.mlp.experts.__class__ = OwnForward
    assert not lay_apart(model, names[:3], names, Names(model))
    assert not stacks(model)
    model = empty(mixtral)
    assert lay_apart(model, names[:3], names, Names(model))
    assert len(stacks(model)) == 2


def test_so_are_those_with_parameters_of_another_kind(mixtral: FamilyModel) -> None:
    names = [name for name in tensors_of(mixtral.dense) if ".experts." in name]
    model = empty(mixtral)
    model.model.layers[0].mlp.experts.register_buffer("scale", torch.ones(4, device="meta"))
    assert not lay_apart(model, names, names, Names(model))


def test_experts_that_are_multiplied_all_at_once_are_not_laid_apart() -> None:
    with torch.device("meta"):
        model = Llama4ForCausalLM(
            Llama4TextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, interleave_moe_layer_step=1,
            )
        )  # fmt: skip
    names = list(model.state_dict())
    assert any("experts" in name for name in names)
    assert not lay_apart(model, names, names, Names(model))
