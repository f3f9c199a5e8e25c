"""Mixtures of experts that are refused or stay fused: damaged parts, other implementations, unknown classes."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import swsc_core.hf.lora  # noqa: F401  # puts adapters on compressed layers
from jobs.cli import main
from swsc_core.compressed.config_json import part_name
from swsc_core.hf.experts import require_eager, unfuse_experts
from swsc_core.hf.weight_names import WeightNames
from tests.support.families import FamilyModel, experts_of, tensors_of


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    return FamilyModel("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def place(mixtral: FamilyModel, tmp_path: Path) -> Path:
    """A copy of a compressed directory, to be damaged."""
    return Path(shutil.copytree(mixtral.compressed, tmp_path / "model"))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_another_implementation_is_refused_by_name(mixtral: FamilyModel, implementation: str) -> None:
    message = f"experts_implementation '{implementation}' .*dequantize=True"
    with pytest.raises(ValueError, match=message):
        mixtral.load(mixtral.compressed, experts_implementation=implementation)
    model = mixtral.load(mixtral.compressed, experts_implementation="eager")
    model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=message):
        mixtral.logits(model)


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["w1", "w2", "w3"]}, {"target_modules": "all-linear"},
    {"target_parameters": ["experts.down_proj"]}],
    ids=str,
)  # fmt: skip
def test_adapters_on_experts_are_refused_by_name(mixtral: FamilyModel, targets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="down_proj"):
        get_peft_model(mixtral.load(mixtral.compressed), LoraConfig(r=2, **targets))


def changed(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = next(file for file in sorted(directory.glob("*.safetensors")) if name in load_file(file))
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
LABELS, LEFT = part_name(W1, "labels"), part_name(W1, "left")
DAMAGES = {
    "a part is missing": (LABELS, lambda t: t.pop(LABELS), "experts.2.w1.labels is missing"),
    "a part of another shape": (LEFT, lambda t: t.update({LEFT: t[LEFT][:, :-1].contiguous()}),
    "experts.2.w1.left is F32"),
    "a part of another kind": (LABELS, lambda t: t.update({LABELS: t[LABELS].float()}), "experts.2.w1.labels is F32"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_of_an_expert_are_refused_by_name(place: Path, mixtral: FamilyModel, damage: str) -> None:
    name, change, message = DAMAGES[damage]
    changed(place, name, change)
    with pytest.raises(ValueError, match=message):
        mixtral.load(place)


def test_a_label_out_of_range_is_refused_by_name(mixtral: FamilyModel, tmp_path: Path) -> None:
    place = tmp_path / "model"
    assert (
        main(
            [
                "compress",
                str(mixtral.dense),
                str(place),
                "--local",
                "--projectors",
                "experts",
                "--clusters",
                "5",
                "--rank",
                "1",
            ]
        )
        == 0
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
    with pytest.raises(ValueError, match=r"experts.0.w1.weight is \[128, 64\] in this model.*\[96, 64\]"):
        mixtral.load(place)


def test_experts_are_not_spread_over_processes(mixtral: FamilyModel) -> None:
    model = mixtral.load(mixtral.compressed)
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match="distributed_config"):
        require_eager(model, {})


class OwnForward(MixtralExperts):
    """Experts whose forward pass is no one's but theirs."""

    def forward(self, *_: Any) -> Any:
        raise NotImplementedError


def empty(family: FamilyModel) -> Any:
    config = MixtralConfig.from_pretrained(family.dense)
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def test_experts_with_a_custom_forward_pass_are_not_unfused(mixtral: FamilyModel) -> None:
    names = [name for name in tensors_of(mixtral.dense) if ".experts." in name]
    model = empty(mixtral)
    for layer in model.model.layers[1:]:
        layer.mlp.experts.__class__ = OwnForward
    assert not unfuse_experts(model, names[:3], names, WeightNames(model))
    assert not experts_of(model)
    model = empty(mixtral)
    assert unfuse_experts(model, names[:3], names, WeightNames(model))
    assert len(experts_of(model)) == 2


def test_such_experts_are_restored_while_they_are_loaded(
    mixtral: FamilyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MixtralExperts, "forward", inspect.unwrap(MixtralExperts.forward))
    model = mixtral.load(mixtral.compressed, experts_implementation="grouped_mm")
    assert not experts_of(model)
    assert mixtral.off(model, mixtral.load(mixtral.restored(mixtral.compressed))) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert mixtral.off(mixtral.load(tmp_path / "saved"), model) <= 1e-5


def test_neither_are_those_with_parameters_of_another_kind(mixtral: FamilyModel) -> None:
    names = [name for name in tensors_of(mixtral.dense) if ".experts." in name]
    model = empty(mixtral)
    model.model.layers[0].mlp.experts.register_buffer("scale", torch.ones(4, device="meta"))
    assert not unfuse_experts(model, names, names, WeightNames(model))


def test_experts_that_are_multiplied_in_one_product_are_not_unfused() -> None:
    with torch.device("meta"):
        model = Llama4ForCausalLM(
            Llama4TextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, interleave_moe_layer_step=1,
            )
        )  # fmt: skip
    names = list(model.state_dict())
    assert any("experts" in name for name in names)
    assert not unfuse_experts(model, names, names, WeightNames(model))
