"""Tiny random models of many families, built from transformers' config classes and saved under the Hub's tensor names.

A test that uses the fixture `family` runs once per family.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from jobs.cli import main
from swsc_core import SwscExperts, align

t: Any = transformers  # its config classes take more arguments than their annotations name

_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
_WHOLE = {**_SHAPE, "num_key_value_heads": 4}
_NEOX = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
_FALCON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_MLA = {
    **_WHOLE, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_LLAMA4 = {
    **_SHAPE,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "head_dim": 16,
    "interleave_moe_layer_step": 2,
}
_VISION_QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MODELS: dict[str, Callable[[], Any]] = {
    "llama 2": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_WHOLE)),
    "llama 3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SHAPE, rope_theta=500000.0, tie_word_embeddings=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_SHAPE, sliding_window=16)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_SHAPE)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_SHAPE, head_dim=16)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_SHAPE, head_dim=16)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_SHAPE)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_NEOX)),
    "falcon 7b": lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, multi_query=True)),
    "falcon 40b": lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True)),
    "falcon rw": lambda: t.FalconForCausalLM(
        t.FalconConfig(**_FALCON, multi_query=False, alibi=True, parallel_attn=False, bias=True)
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    ),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=256, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
            max_position_embeddings=128, word_embed_proj_dim=64,
        )
    ),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_SHAPE, num_local_experts=4)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**_SHAPE, **_EXPERTS, shared_expert_intermediate_size=48)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_SHAPE, **_EXPERTS, head_dim=16)),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**_MLA, q_lora_rank=None)),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_MLA, q_lora_rank=24)),
    "llama4": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**_LLAMA4)),
    "llama4 with vision": lambda: t.Llama4ForConditionalGeneration(
        t.Llama4Config(
            text_config=_LLAMA4,
            vision_config={**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        )
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=16)
    ),
    "granitemoeshared": lambda: t.GraniteMoeSharedForCausalLM(
        t.GraniteMoeSharedConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48)
    ),
    "aria_text": lambda: t.AriaTextForCausalLM(
        t.AriaTextConfig(**_SHAPE, moe_num_experts=12, moe_topk=2, moe_num_shared_experts=1)  # 10 comes after 9
    ),
    "qwen3_vl_moe": lambda: t.Qwen3VLMoeForConditionalGeneration(
        t.Qwen3VLMoeConfig(
            text_config={**_SHAPE, **_EXPERTS, "head_dim": 16, "rope_parameters": _ROPE, "mlp_only_layers": [0]},
            vision_config={
                **_VISION_QWEN, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        )
    ),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**_SHAPE), image_token_index=255,
            vision_config=t.CLIPVisionConfig(**_VISION, projection_dim=32),
        )
    ),
    "gemma3 with vision": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config={**_SHAPE, "head_dim": 16}, vision_config=_VISION, mm_tokens_per_image=4)
    ),
    "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config={**_SHAPE, "rope_parameters": _ROPE},
            vision_config={
                "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2,
            },
        )
    ),
}  # fmt: skip
_ALL = "q,k,v,o,gate,up,down,experts"
# projections of families whose projections differ from those of Llama
_ROLES = {
    **dict.fromkeys(("gpt_neox", "falcon 7b", "falcon 40b", "falcon rw", "bloom", "gpt2", "opt"), "q,k,v,o,up,down"),
    **dict.fromkeys(("qwen2_moe", "deepseek_v2", "deepseek_v3"), _ALL),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), "q,k,v,o,experts"),
    **dict.fromkeys(("llama4", "llama4 with vision", "granitemoeshared", "aria_text", "qwen3_vl_moe"), _ALL),
}
# families that store all experts of a layer in one tensor
STACKED = (
    "llama4",
    "llama4 with vision",
    "gpt_oss",
    "granitemoeshared",
    "aria_text",
    "qwen3_vl_moe",
)
_COARSE = ["--clusters", "4", "--rank", "2", "--n-init", "1", "--local"]


@dataclass(frozen=True)
class FamilyModel:
    """A tiny model in float32 in a directory, and its compressed and restored forms, which are created on first use."""

    name: str
    folder: Path

    @cached_property
    def dense(self) -> Path:
        """The checkpoint as `save_pretrained` writes it, in several files that split layers."""
        path = self.folder / "dense"
        torch.manual_seed(0)
        MODELS[self.name]().save_pretrained(path, max_shard_size="100KB")
        return path

    @property
    def roles(self) -> str:
        """All projections of its language model, for --projectors."""
        return _ROLES.get(self.name, "q,k,v,o,gate,up,down")

    @cached_property
    def compressed(self) -> Path:
        """An output in which all projections are compressed."""
        return self.compress("all", "--projectors", self.roles)

    @cached_property
    def queries_and_keys(self) -> Path:
        """An output in which Q and K are compressed."""
        return self.compress("qk", "--projectors", "q,k")

    def compress(self, name: str, *flags: str) -> Path:
        """Compress the model with few clusters and a low rank into the directory `name`."""
        assert main(["compress", str(self.dense), str(self.folder / name), *_COARSE, *flags]) == 0
        return self.folder / name

    def restored(self, compressed: Path) -> Path:
        """Restore an output into a dense directory."""
        path = compressed.with_name(f"{compressed.name}-restored")
        assert path.exists() or main(["restore", str(compressed), str(path), "--local"]) == 0
        return path

    def load(self, directory: Path, **how: Any) -> Any:
        """Load a directory by the class that its config names, in evaluation mode and aligned memory."""
        kind = getattr(t, json.loads((self.dense / "config.json").read_text())["architectures"][0])
        model, info = kind.from_pretrained(directory, output_loading_info=True, **how)
        assert not info["missing_keys"]
        # results are equal to the bit in aligned memory only (test_kernels.py tests other alignments)
        align(model)
        return model.eval()

    def logits(self, model: Any) -> torch.Tensor:
        """Logits [1, 24, vocabulary] of a fixed text."""
        with torch.no_grad():
            return model(input_ids=torch.arange(1, 25)[None]).logits

    def off(self, first: Any, second: Any) -> float:
        """Largest difference of the logits, relative to the largest logit; weights are ten times the usual size."""
        reference = self.logits(second)
        return float((self.logits(first) - reference).abs().max() / reference.abs().max().clamp(min=1))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All stored tensors of a directory."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def experts_of(model: Any) -> list[SwscExperts]:
    """The unfused experts, layer by layer."""
    return [module for module in model.modules() if isinstance(module, SwscExperts)]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FamilyModel]:
    """All families; tests do not change them, so that all test files share their compressed and restored forms."""
    return {name: FamilyModel(name, tmp_path_factory.mktemp(name.replace(" ", "-"))) for name in MODELS}


@pytest.fixture(scope="session", params=MODELS)
def family(request: pytest.FixtureRequest, families: dict[str, FamilyModel]) -> FamilyModel:
    """Each family in turn."""
    return families[request.param]
