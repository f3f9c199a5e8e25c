"""Locations of Q, K and V in fused tensors, compared with the code of the models that use them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomConfig
from transformers.models.falcon.modeling_falcon import FalconAttention

from pipeline.architectures.families import Family
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.models.matrices import find_matrix, matrices_of
from pipeline.storage.store import Store
from swsc_core.storage.row_blocks import RowBlocks, apply_view, fuse_rows, remaining_rows, require_partition

N = 5  # inputs


def pieces(name: str, weight: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """The pieces of a fused tensor, by role."""
    info = TensorInfo(name, "F32", tuple(weight.shape), "model.safetensors", 0, 4 * weight.numel())
    checkpoint = Checkpoint(Store("/nowhere"), {name: info}, config)
    found = matrices_of(checkpoint, Family(config), info)
    for matrix in found:
        assert find_matrix(checkpoint, matrix.name) == matrix
    return {matrix.role or "": apply_view(weight, matrix.location.transposed, matrix.rows) for matrix in found}


def heads_of(outputs: Tensor, heads: int) -> Tensor:
    """[1, N, …] per head, as models split what comes out -> rows [heads * width, N]."""
    return outputs.reshape(N, heads, -1).permute(1, 2, 0).reshape(-1, N)


@pytest.mark.parametrize(
    ("kind", "pairs", "rows"),
    [
        ({"multi_query": True}, 1, 6 * 8),
        ({"multi_query": False}, 4, 12 * 8),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, 8 * 8),
    ],
)
def test_falcon(kind: dict[str, Any], pairs: int, rows: int) -> None:
    config = FalconConfig(hidden_size=32, num_attention_heads=4, **kind)
    weight = torch.randn(rows, N)
    split = FalconAttention(config, layer_idx=0)._split_heads(weight.T[None])
    found = pieces("h.0.self_attention.query_key_value.weight", weight, config.to_dict())
    q, k, v = (piece[0].reshape(N, -1, 8) for piece in split)
    repeats = k.shape[1] // pairs  # the new decoder repeats keys and values for the heads that share them
    for role, piece in (("q", q), ("k", k[:, ::repeats]), ("v", v[:, ::repeats])):
        assert torch.equal(found[role], heads_of(piece, piece.shape[1])), role


def test_bloom_and_gpt_neox() -> None:
    config = BloomConfig(hidden_size=32, n_head=4)
    weight = torch.randn(96, N)
    split = BloomAttention(config, layer_idx=0)._reshape(weight.T[None])
    names = {
        "h.0.self_attention.query_key_value.weight": config.to_dict(),
        "gpt_neox.layers.0.attention.query_key_value.weight": {
            "model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4,
        },
    }  # fmt: skip
    for name, about in names.items():
        found = pieces(name, weight, about)
        for role, piece in zip("qkv", split, strict=True):  # [1, heads, N, width]
            assert torch.equal(found[role], piece[0].permute(0, 2, 1).reshape(-1, N)), role


def test_bloom_has_an_alias_for_its_width() -> None:
    """config.json of bigscience/bloom, and of those made like it, has n_embed.

    Transformers takes it for hidden_size.
    """
    name, weight = "h.0.self_attention.query_key_value.weight", torch.randn(96, N)
    config_json: dict[str, Any] = {"model_type": "bloom", "n_embed": 32, "n_layer": 1, "num_attention_heads": 4}
    assert BloomConfig(**config_json).hidden_size == 32
    old, new = pieces(name, weight, config_json), pieces(name, weight, BloomConfig(**config_json).to_dict())
    assert all(torch.equal(old[role], new[role]) for role in "qkv")


def test_gpt_2_is_transposed_and_phi_3_is_not() -> None:
    weight = torch.randn(N, 96)
    found = pieces("h.0.attn.c_attn.weight", weight, {"model_type": "gpt2", "n_embd": 32, "n_head": 4})
    for role, columns in zip("qkv", weight.split(32, dim=1), strict=True):
        assert torch.equal(found[role], columns.T)
    config = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    weight = torch.randn(64, N)
    found = pieces("model.layers.0.self_attn.qkv_proj.weight", weight, config)
    for role, rows in zip("qkv", weight.split([32, 16, 16]), strict=True):
        assert torch.equal(found[role], rows)


def test_keys_and_values_of_a_latent_come_head_by_head() -> None:
    config = {
        "model_type": "deepseek_v3", "hidden_size": 32, "num_attention_heads": 2, "qk_nope_head_dim": 3,
        "v_head_dim": 4,
    }  # fmt: skip
    weight = torch.randn(14, N)
    found = pieces("model.layers.0.self_attn.kv_b_proj.weight", weight, config)
    k, v = weight.view(2, 7, N).split([3, 4], dim=1)
    assert torch.equal(found["k"], k.reshape(-1, N))
    assert torch.equal(found["v"], v.reshape(-1, N))


@pytest.mark.parametrize(
    ("heads", "expected"), [(5, "has 96 rows, but by config.json q.k.v take 5 times"), (0, ""), (float("inf"), "")]
)
def test_a_config_that_does_not_fit_the_tensor_is_refused(heads: float, expected: str) -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": heads}
    with pytest.raises(CheckpointError, match=rf"query_key_value.weight.*{expected}"):
        pieces("gpt_neox.layers.0.attention.query_key_value.weight", torch.randn(96, N), config)


def test_pieces_and_the_rest_make_up_the_whole_again() -> None:
    weight = torch.randn(96, N)
    q, v = RowBlocks(0, 8, 24, 4), RowBlocks(16, 8, 24, 4)
    rest = weight[remaining_rows(96, [q, v])]
    assert torch.equal(rest, RowBlocks(8, 8, 24, 4).take(weight))
    assert torch.equal(fuse_rows(rest, [v, q], [v.take(weight), q.take(weight)]), weight)
    with pytest.raises(ValueError, match="overlap"):
        fuse_rows(rest, [q, q], [q.take(weight), q.take(weight)])
    for remaining, row_blocks in ((31, [q, v]), (0, [RowBlocks(0, 8, 0, 4)])):
        with pytest.raises(ValueError, match="fused matrix"):
            require_partition(remaining, row_blocks)
