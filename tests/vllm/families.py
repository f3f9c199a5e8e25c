"""Tiny models of families with other layouts than Llama's: fused, fused head by head, transposed, or experts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from swsc_core import RtnSpec, SwscSpec
from swsc_core.method.spec import Spec
from swsc_core.storage.row_blocks import RowBlocks
from tests.support.tiny import save_tokenizer
from tests.vllm.checkpoints import compress

t: Any = transformers  # its config classes take more arguments than their annotations name

OUTPUT, INPUT, RTN = SwscSpec(20, 4), SwscSpec(20, 4, "input"), RtnSpec(4, "group", 16)
SEGMENTS = SwscSpec(32, 4, segment_size=8, codebooks=2, scaled=True)
_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15,
}  # fmt: skip
_WIDE: dict[str, Any] = {**_SHAPE, "intermediate_size": 192, "max_position_embeddings": 128, "pad_token_id": 0}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_QKV = "qkv"


def _gpt2() -> Any:
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15)
    )


Fused = dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]]  # matrix -> times, rows of each piece each time, pieces
MODELS: dict[str, tuple[Callable[[], Any], Fused]] = {
    "phi3": (
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED)),
        {"qkv_proj": (1, (128, 64, 64), tuple(_QKV)), "gate_up_proj": (1, (192, 192), ("gate", "up"))},
    ),
    "gpt_neox": (
        lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_WIDE)),
        {"query_key_value": (4, (32, 32, 32), tuple(_QKV))},
    ),
    "falcon 7b": (
        lambda: t.FalconForCausalLM(t.FalconConfig(**_SHAPE, multi_query=True)),
        {"query_key_value": (1, (128, 32, 32), tuple(_QKV))},
    ),
    "falcon 40b": (
        lambda: t.FalconForCausalLM(t.FalconConfig(**_SHAPE, num_kv_heads=2, new_decoder_architecture=True)),
        {"query_key_value": (2, (64, 32, 32), tuple(_QKV))},
    ),
    "gpt2": (_gpt2, {"c_attn": (1, (128, 128, 128), tuple(_QKV))}),
    "gpt2 of the hub": (_gpt2, {"c_attn": (1, (128, 128, 128), tuple(_QKV))}),  # names without "transformer."
    "bloom": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=256, hidden_size=128, n_layer=2, n_head=4)),
        {"query_key_value": (4, (32, 32, 32), tuple(_QKV))},
    ),
    "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=4)), {}),
    "qwen3_moe": (
        lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                **_GROUPED, head_dim=32, num_experts=4, moe_intermediate_size=64, num_experts_per_tok=2
            )
        ),
        {},
    ),
}  # fmt: skip


def made(path: Path, name: str) -> tuple[Path, Path]:
    """A model of the family compressed, and restored.

    Its first layer whole in one kind, of its second some, in others.
    """
    factory, fused = MODELS[name]
    torch.manual_seed(0)
    model = factory()
    model.save_pretrained(path / "model")
    if name == "gpt2 of the hub":
        file = path / "model" / "model.safetensors"
        tensors = load_file(file)
        save_file({key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
    save_tokenizer(path / "model")
    specs: dict[str, Spec] = {}
    rows: dict[str, RowBlocks] = {}
    for tensor, stem in _matrices(path / "model"):
        last = stem.rpartition(".")[2]
        own = [tensor]
        if last in fused:
            times, lengths, pieces = fused[last]
            own = [f"{stem}.{piece}.weight" for piece in pieces]
            firsts = [sum(lengths[:place]) for place in range(len(lengths))]
            rows |= {
                piece: RowBlocks(first, length, sum(lengths), times)
                for piece, first, length in zip(own, firsts, lengths, strict=True)
            }
        kinds: tuple[Spec | None, ...] = (
            (OUTPUT, OUTPUT, OUTPUT) if re.match(r"\D*0\b", stem) else (SEGMENTS, None, RTN)
        )
        if "experts" in stem:
            kinds = ((OUTPUT, SEGMENTS, RTN, None)[int(stem.split("experts.")[1][0])],)
        specs |= {matrix: kind for matrix, kind in zip(own, kinds, strict=False) if kind}
    turned = r"\.c_\w+\.weight$" if name.startswith("gpt2") else "$."
    return compress(path / "model", path, specs, rows, turned)


def _matrices(model: Path) -> list[tuple[str, str]]:
    tensors = load_file(model / "model.safetensors")
    names = [name for name, tensor in tensors.items() if tensor.ndim == 2 and re.search(r"\b(layers|h)\.\d+\.", name)]
    return [(name, name.removesuffix(".weight")) for name in names if not name.endswith(".gate.weight")]
