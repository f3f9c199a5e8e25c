"""Families × layouts of a checkpoint: every stage uses the weights that `from_pretrained` does, or refuses before work.

pytest tests/integration/checkpoints/test_model_table.py --hypothesis-profile thorough    all families
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import swsc_core.hf  # noqa: F401
from pipeline.checkpoints.redundant_tensors import find_ties
from pipeline.checkpoints.weight_files import INDEX, SINGLE
from pipeline.errors import CheckpointError
from pipeline.models.agreement import require_agreement
from pipeline.models.loading import ModelKey, load_model
from pipeline.models.stored_model import Model, open_model
from pipeline.planning.plan import make_plan
from pipeline.settings.matrix import MatrixSettings
from swsc_core.hf.weight_names import WeightNames, saved_name
from tests.support.families import MODELS

_QUICK = ("llama 3", "gemma2", "gpt2", "bloom", "qwen3_moe", "gemma3 with vision", "qwen3_vl_moe", "tied gpt_neox")
EXTRA: dict[str, Callable[[], Any]] = {
    "tied gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2, tie_word_embeddings=True,
        )
    ),
}  # fmt: skip


class Layout:
    """A family's model in one file, and what may be done to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = ({**MODELS, **EXTRA}[name])().eval()
        self.model.save_pretrained(folder, max_shard_size="1GB")
        self.weights = load_file(folder / SINGLE)

    def save(self, weights: dict[str, torch.Tensor]) -> None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, self.folder / SINGLE)

    def configure(self, **changes: Any) -> None:
        """Change the config's own keys and, if it has a part for text, those there; `...` takes one out."""
        config = json.loads((self.folder / "config.json").read_text())
        for part in (config, config.get("text_config") or {}):
            for key, value in changes.items():
                part.pop(key, None) if value is ... else part.update({key: value})
        (self.folder / "config.json").write_text(json.dumps(config))

    def with_copies(self, change: float = 0.0) -> list[str]:
        """Every tied tensor is stored under its other name, too, plus `change`; returns these names."""
        names = WeightNames(self.model)
        stored = {names.target(name)[0]: name for name in self.weights}
        copies = {
            saved_name(self.model, one): self.weights[stored[other]].clone() + change
            for one, other in self.model.all_tied_weights_keys.items()
        }
        self.save({**self.weights, **copies})
        return [*copies]

    def opened(self) -> Model:
        """The model, after the check that comes before any work."""
        model = open_model(str(self.folder))
        require_agreement(model, measured=True)
        return model

    def difference(self) -> float:
        """Between the logits of `from_pretrained` and of the model that is measured, to the largest."""
        mine = load_model(self.opened(), ModelKey(str(self.folder), "float32", 1), "cpu")
        theirs = type(mine).from_pretrained(self.folder, dtype=torch.float32).eval()
        return _difference(mine, theirs)


def _difference(one: Any, other: Any) -> float:
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids).logits for model in (one, other))
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family_name" in metafunc.fixturenames:
        thorough = metafunc.config.getoption("--hypothesis-profile") == "thorough"
        metafunc.parametrize("family_name", [*MODELS, *EXTRA] if thorough else _QUICK)


@pytest.fixture
def layout(family_name: str, tmp_path: Path) -> Layout:
    return Layout(family_name, tmp_path / "model")


def test_ties_are_those_of_the_class_whether_config_json_has_them_or_not(layout: Layout) -> None:
    expected = {saved_name(layout.model, one) for one in layout.model.all_tied_weights_keys}
    for stated in (True, False):
        if not stated and type(layout.model.config)().tie_word_embeddings == layout.model.config.tie_word_embeddings:
            layout.configure(tie_word_embeddings=...)
        model = layout.opened()
        found = find_ties(model.names, model.checkpoint.config, "it")
        assert {tie.name for tie in found} == expected
        assert layout.difference() < 1e-6


def test_a_copy_that_is_stored_is_dropped_counted_and_reported(layout: Layout) -> None:
    weights = open_model(str(layout.folder)).weights
    copies = layout.with_copies()
    model = layout.opened()
    assert {tie.name for tie in model.checkpoint.copies} == {*copies}
    assert model.weights == weights
    assert layout.difference() < 1e-6
    if copies:
        plan = make_plan(
            model.checkpoint, MatrixSettings(include=model.checkpoint.copies[0].shares.replace(".", r"\."))
        )
        assert {d.info.name for d in plan.decisions if d.action == "tied"} == {*copies}
        assert plan.weights == weights


def test_a_copy_of_other_values_stays_a_weight_as_in_transformers(layout: Layout) -> None:
    copies = layout.with_copies(change=0.5)
    model = layout.opened()
    assert {tie.name for tie in model.checkpoint.untied} == {*copies}
    assert {*copies} <= {*model.names}
    assert layout.difference() < 1e-6


def test_other_files_beside_are_not_the_model(layout: Layout) -> None:
    others = {name: tensor + 1 for name, tensor in layout.weights.items()}
    for name in ("model-00001-of-00001.safetensors", "adapter_model.safetensors", "consolidated.safetensors"):
        save_file(others, layout.folder / name)
    (layout.folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(others, "model-00001-of-00001.safetensors")})
    )
    assert layout.difference() < 1e-6
    (layout.folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q"]})
    )
    assert (
        _difference(load_model(layout.opened(), ModelKey(str(layout.folder), "float32", 1), "cpu"), layout.model) < 1e-6
    )


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
def test_wrapped_names_are_refused(layout: Layout, wrapper: str) -> None:
    layout.save({wrapper + name: tensor for name, tensor in layout.weights.items()})
    with pytest.raises(CheckpointError, match=wrapper.rstrip(".")):
        layout.opened()


def test_a_weight_that_is_missing_or_too_many_is_refused_by_name(layout: Layout) -> None:
    name = next(name for name in layout.weights if "norm" in name or "ln" in name or "layernorm" in name)
    layout.save({own: tensor for own, tensor in layout.weights.items() if own != name})
    with pytest.raises(CheckpointError, match=name.rpartition(".")[0].rpartition(".")[2]):
        layout.opened()
    layout.save({**layout.weights, "stray.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"stray\.weight"):
        layout.opened()
