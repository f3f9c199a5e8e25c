"""The table of families is compared with transformers.

Each role of a line is in the checkpoints that the family saves.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.architectures.families import FAMILIES, Family
from pipeline.checkpoints.source import open_checkpoint
from pipeline.models.matrices import matrices_of

# three forms of it in tests/support/families.py; has no code in transformers; is part of a multimodal one there
_ELSEWHERE = {"falcon", "internlm2", "qwen3_vl_moe_text"}
_KINDS = [kind for kind in FAMILIES if kind not in _ELSEWHERE and not kind.endswith("_vl_text")]
_DENSE = {"qwen3_moe", "olmoe"}  # every layer is a mixture, unless mlp_only_layers excludes it
_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "n_routed_experts": 4,
    "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "moe_k": 2, "shared_intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_OLD = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
_SHAPES = {
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "gpt2": _OLD, "openai-gpt": _OLD,
    "gptj": {**_OLD, "rotary_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", _KINDS)
def test_every_role_is_found_and_nothing_else_is_linear(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip("younger than this transformers")
    config = CONFIG_MAPPING[kind](**_SHAPES.get(kind, _SHAPE))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_checkpoint(str(tmp_path))
    family = Family(source.config)
    assert family.name == kind
    found: dict[str | None, list[str]] = {}
    for info in source.tensors.values():
        for matrix in matrices_of(source, family, info):
            if len(info.shape) > 1:
                found.setdefault(matrix.role, []).append(matrix.name)
    expected = set(family.roles) - ({"gate", "up", "down"} if kind in _DENSE else set())
    assert found.keys() - {None} == expected
    others = ("embed", "lm_head", "wte", "wpe", "mlp.gate.", "moe.gate.", "shared_expert_gate", "router", "_bias")
    assert not [name for name in found[None] if not any(other in name for other in others)]
