"""Buffers, and tied tensors that are stored twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.redundant_tensors import Tie, find_copies, is_buffer, untied_config
from pipeline.storage.store import Store

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"model_type": "of no class", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.attn.bias", (1, 1, 8, 8), True), ("h.0.attn.bias", (24,), False), ("h.0.attn.masked_bias", (), True),
        ("layers.0.self_attn.rotary_emb.inv_freq", (4,), True), ("layers.0.attn.weight", (8, 8), False),
    ],
)  # fmt: skip
def test_masks_and_frequencies_are_buffers(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_buffer(TensorInfo(name, "F32", shape, "f", 8, 0)) == expected


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_is_a_copy_only_if_its_values_are_equal(tmp_path: Path, equal: bool) -> None:
    embedding = torch.randn(32, 4)
    save_file({EMBEDDING: embedding, HEAD: embedding + (not equal)}, tmp_path / "m.safetensors")
    store = Store.at(str(tmp_path))
    tensors = {info.name: info for info in read_header(store, "m.safetensors")[1]}
    copies = find_copies(store, tensors, TIED)
    assert (copies.equal if equal else copies.different) == (Tie(HEAD, EMBEDDING),)
    assert not (copies.different if equal else copies.equal)
    assert find_copies(store, tensors, {"tie_word_embeddings": False}) == ((), ())


def test_the_config_of_an_untied_model() -> None:
    assert untied_config(TIED)["tie_word_embeddings"] is False
    nested = untied_config({"text_config": {"tie_word_embeddings": True, "vocab_size": 8}})
    assert nested == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False, "vocab_size": 8}}
