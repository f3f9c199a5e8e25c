"""Every family opened by transformers from its compressed directory.

The model that is restored from it, in fewer bytes.
"""

from typing import Any

import pytest
import torch

import swsc_core.hf
from swsc_core import SwscJoined, SwscLinear
from tests.support.families import FamilyModel


@pytest.fixture(scope="module")
def opened(family: FamilyModel) -> Any:
    return family.load(family.compressed)


@pytest.fixture(scope="module")
def dense(family: FamilyModel) -> Any:
    return family.load(family.restored(family.compressed))


def tokens(model: Any) -> torch.Tensor:
    found = model.generate(input_ids=torch.arange(1, 13)[None], max_new_tokens=12, do_sample=False, pad_token_id=0)
    return found


def test_logits_are_those_of_the_restored_model(family: FamilyModel, opened: Any, dense: Any) -> None:
    assert family.off(opened, dense) <= 1e-5


def test_so_they_are_of_queries_and_keys_alone(family: FamilyModel) -> None:
    model = family.load(family.queries_and_keys)
    assert any(isinstance(layer, SwscLinear) for layer in model.modules())
    assert family.off(model, family.load(family.restored(family.queries_and_keys))) <= 1e-5


def test_in_bfloat16_every_tensor_is_of_the_dtype_that_it_has_in_the_restored_model(family: FamilyModel) -> None:
    restored = family.load(family.restored(family.compressed), dtype=torch.bfloat16).state_dict()
    model = family.load(family.compressed, dtype=torch.bfloat16)
    floats = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {name: kind for name, kind in floats.items() if name in restored} == {
        name: restored[name].dtype for name in floats if name in restored
    }
    assert {kind for name, kind in floats.items() if name not in restored} <= {torch.bfloat16}
    assert family.logits(model).dtype == torch.bfloat16


def test_generated_tokens_are_those_of_the_restored_model(opened: Any, dense: Any) -> None:
    assert torch.equal(tokens(opened), tokens(dense))


def test_a_saved_and_reopened_model_has_equal_logits(family: FamilyModel, opened: Any) -> None:
    saved = family.folder / "saved"
    opened.save_pretrained(saved, max_shard_size="100KB")
    assert torch.equal(family.logits(family.load(saved)), family.logits(opened))
    assert family.off(family.load(family.restored(saved)), opened) <= 1e-5


def test_dequantized_on_load_or_afterwards_it_is_the_restored_model(family: FamilyModel, dense: Any) -> None:
    on_load = family.load(family.compressed, quantization_config=swsc_core.hf.SwscConfig(dequantize=True))
    afterwards = family.load(family.compressed)
    afterwards.dequantize()
    for model in (on_load, afterwards):
        assert not any(isinstance(layer, SwscLinear | SwscJoined) for layer in model.modules())
        assert model.state_dict().keys() == dense.state_dict().keys()
        assert torch.equal(family.logits(model), family.logits(dense))
