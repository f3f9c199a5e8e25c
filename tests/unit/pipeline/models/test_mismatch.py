"""Differences between files and config.json are explained by their common cause, with its remedy."""

from typing import Any

import pytest
from torch import nn

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.meta_model import MetaModel
from pipeline.models.mismatch import Mismatch, describe, first_of, is_incomplete, known_cause, layer_index
from pipeline.models.stored_model import Model
from pipeline.storage.store import Store

PARAMETERS = [f"model.layers.{layer}.{leaf}.weight" for layer in range(2) for leaf in ("q", "k")]
HEAD = "lm_head.weight"


class Tiny(nn.Module):
    """A model with an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(2, 2, device="meta")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def stored(names: list[str], layers: int = 2) -> Model:
    tensors = {name: TensorInfo(name, "F32", (2, 2), "model.safetensors", 0, 16) for name in names}
    return Model(Checkpoint(Store("/nowhere"), tensors, {"model_type": "llama", "num_hidden_layers": layers}), {})


def differing(
    missing: list[str] | None = None, unknown: list[str] | None = None, shapes: list[Any] | None = None
) -> Mismatch:
    return Mismatch("TinyForCausalLM", missing or [], unknown or [], shapes or [])


def cause_of(model: Model, mismatch: Mismatch) -> str | None:
    return known_cause(model, mismatch, MetaModel(Tiny(), None))


def test_a_mismatch_without_differences_is_false() -> None:
    assert not differing()
    assert differing(missing=[HEAD])
    assert differing(shapes=[("a.weight", [2, 2], [2, 3])])


@pytest.mark.parametrize(
    ("template", "inserted", "wrapper", "remedy"),
    [
        ("module.{}", "module.", "DataParallel or DistributedDataParallel", "save the model inside the wrapper"),
        ("_orig_mod.{}", "_orig_mod.", "torch.compile", "save the model inside the wrapper"),
        ("base_model.model.{}", "base_model.model.", "PEFT", "merge the adapter"),
        ("wrapped.{}", "wrapped.", "a wrapper", "save the model inside the wrapper"),
    ],
)
def test_words_that_a_wrapper_inserted_are_named_with_the_wrapper(
    template: str, inserted: str, wrapper: str, remedy: str
) -> None:
    names = [template.format(name) for name in PARAMETERS]
    cause = cause_of(stored(names), differing(PARAMETERS, names))
    assert cause is not None
    assert f"'{inserted}', which {wrapper} inserts" in cause
    assert remedy in cause


def test_a_word_within_the_names_is_found() -> None:
    names = [name.replace(".weight", ".base_layer.weight") for name in PARAMETERS]
    cause = cause_of(stored(names), differing(PARAMETERS, names))
    assert cause is not None
    assert "'base_layer.', which PEFT inserts" in cause


def test_layers_that_config_json_does_not_count_are_the_cause() -> None:
    cause = cause_of(stored(PARAMETERS, layers=1), differing(unknown=PARAMETERS[2:]))
    assert cause is not None
    assert cause.startswith("config.json has 1 layers, but the files hold 2 weights of further layers")
    assert PARAMETERS[2] in cause


def test_layers_that_the_files_lack_are_the_cause() -> None:
    cause = cause_of(stored(PARAMETERS[:2]), differing(PARAMETERS[2:]))
    assert cause is not None
    assert cause.startswith("config.json has 2 layers, but the files end with layer 0")


def test_another_shape_is_stated_on_both_sides() -> None:
    cause = cause_of(stored(PARAMETERS), differing(shapes=[(PARAMETERS[0], [2, 2], [4, 2])]))
    assert cause is not None
    assert f"{PARAMETERS[0]} has shape [2, 2] in the files, but [4, 2] by config.json" in cause


def test_a_missing_head_is_the_cause_only_if_nothing_else_differs() -> None:
    cause = cause_of(stored(PARAMETERS), differing([HEAD]))
    assert cause is not None
    assert "tie_word_embeddings" in cause
    assert cause_of(stored([*PARAMETERS, "odd.weight"]), differing([HEAD], ["odd.weight"])) is None


def test_other_differences_are_described_with_a_remedy() -> None:
    model, absent = stored([*PARAMETERS[:3], "odd.weight"]), PARAMETERS[3]
    incomplete, other = differing([absent]), differing([absent], ["odd.weight"])
    assert is_incomplete(model, incomplete)
    assert "lack 1 weights" in describe(model, incomplete)
    assert "provide all files of the model" in describe(model, incomplete)
    assert not is_incomplete(model, other)
    assert "lack 1 weights" in describe(model, other)
    assert "hold 1 unknown weights (odd.weight)" in describe(model, other)
    assert "repair config.json" in describe(model, other)


def test_the_index_of_a_layer_is_the_first_number_of_a_name() -> None:
    assert layer_index("model.layers.12.experts.3.w1.weight") == 12
    assert layer_index("0.weight") == 0
    assert layer_index("lm_head.weight") is None


def test_only_the_first_of_several_names_is_marked_as_the_first() -> None:
    assert first_of(["a"]) == "a"
    assert first_of(["a", "b"]) == "a first"
