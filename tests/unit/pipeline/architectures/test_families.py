"""Roles of tensors by the family table."""

import pytest

from pipeline.architectures.families import FAMILIES, MULTIMODAL, ROLES, Family, has_position_table, require_known_roles
from pipeline.errors import ConfigError


def test_every_family_has_known_roles_only() -> None:
    for name in FAMILIES:
        family = Family({"model_type": name})
        assert family.known
        assert family.roles == [role for role in ROLES if role in family.roles]
        assert family.roles


def test_every_multimodal_family_has_a_language_part_of_the_table() -> None:
    assert all(Family({"model_type": name}).known for name in MULTIMODAL)


@pytest.mark.parametrize(
    ("model_type", "name", "roles"),
    [
        ("llama", "model.layers.3.self_attn.q_proj.weight", ("q",)),
        ("llama", "model.layers.3.self_attn.q_proj.bias", ()),
        ("gpt2", "h.0.attn.c_attn.weight", ("q", "k", "v")),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", ("gate", "up")),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", ("experts",)),
        ("llava", "language_model.model.layers.0.mlp.up_proj.weight", ("up",)),
        ("llava", "vision_tower.layers.0.self_attn.q_proj.weight", ()),
        ("unknown", "model.layers.3.self_attn.q_proj.weight", ()),
    ],
)
def test_the_role_of_a_tensor(model_type: str, name: str, roles: tuple[str, ...]) -> None:
    assert Family({"model_type": model_type}).role_of(name).roles == roles


def test_convolution_layers_of_gpt2_are_transposed() -> None:
    family = Family({"model_type": "gpt2"})
    assert family.is_transposed("h.0.attn.c_attn.weight")
    assert not family.is_transposed("wte.weight")


def test_layers_after_the_last_one_predict_further_tokens() -> None:
    family = Family({"model_type": "deepseek_v3", "num_hidden_layers": 2})
    assert family.is_beyond("model.layers.2.mlp.up_proj.weight")
    assert not family.is_beyond("model.layers.1.mlp.up_proj.weight")
    assert not family.is_beyond("lm_head.weight")


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(ConfigError, match="qq"):
        require_known_roles(("q", "qq"))


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("gpt2", "transformer.wpe.weight", True),
        ("llama", "model.embed_tokens.weight", False),
        ("gptj", "transformer.wte.weight", True),
        ("llava", "vision_tower.position_embedding.weight", False),
    ],
)
def test_tables_of_positions(model_type: str, name: str, expected: bool) -> None:
    assert has_position_table({"model_type": model_type}, [name]) == expected
