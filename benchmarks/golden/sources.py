"""Small checkpoints and texts, generated from fixed seeds, as inputs of the recorded commands.

This module does not import the project, so that every version of it gives the same sources.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

_WORDS = [f"w{number}" for number in range(250)]
_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
_FALCON: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Divides neither the rows nor the columns of the matrices.
_FP8_BLOCK = 48, 40

MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "tiny": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SHAPE, tie_word_embeddings=True)).bfloat16(),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_SHAPE)),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True, initializer_range=0.2)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
    ),
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**_SHAPE, **_EXPERTS, intermediate_size_mlp=80, interleave_moe_layer_step=2)
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**_SHAPE, **_EXPERTS, sliding_window=16)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_SHAPE, num_local_experts=4)),
    "fp8": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=False)).bfloat16(),
}


def make_sources(folder: Path) -> None:
    """Write every model as `folder/NAME`, `folder/tiny.gguf`, and two texts without common passages."""
    folder.mkdir(parents=True)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name, max_shard_size="60KB" if name != "fp8" else "1GB")
        _save_tokenizer(folder / name)
    _store_as_fp8(folder / "fp8")
    _write_gguf(folder / "tiny.gguf")
    write_text(folder / "calibration.txt", words=10_000, seed=77)
    write_text(folder / "test.txt", words=2_000, seed=0)


def write_text(path: Path, words: int, seed: int) -> None:
    """Write random words of the tiny tokenizer."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(_WORDS) for _ in range(words)), encoding="utf-8")


def _save_tokenizer(path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def _store_as_fp8(path: Path) -> None:
    """Replace the projections by fp8 values with one scale per block, as in DeepSeek-V3 and Qwen3-FP8."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = _fp8_blocks(tensors[name].float())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(_FP8_BLOCK)}
    (path / "config.json").write_text(json.dumps(config))


def _fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 values [m, n] and float32 scales [blocks of rows, blocks of columns] of a float32 weight [m, n]."""
    blocks = [rows.split(_FP8_BLOCK[1], dim=1) for rows in weight.split(_FP8_BLOCK[0])]
    scales = torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in blocks])
    spread = scales.repeat_interleave(_FP8_BLOCK[0], 0).repeat_interleave(_FP8_BLOCK[1], 1)
    return (weight / spread[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn), scales


def _gguf_tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (128, 64), "output.weight": (128, 64)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{role}.weight": (64, 64) for role in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{role}.weight": (96, 64) for role in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down.weight": (64, 96)}
    norms = [f"blk.{layer}.{kind}_norm.weight" for layer in range(2) for kind in ("attn", "ffn")]
    weights = {name: (0.2 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return weights | {name: np.ones(64, np.float32) for name in (*norms, "output_norm.weight")}


def _write_gguf(path: Path) -> None:
    """Write a Llama whose matrices are stored in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    letters, pairs = [chr(0x21 + number) for number in range(90)], ['!"', "#$"]
    writer.add_token_list([*letters, *pairs, *(f"<{number}>" for number in range(36))])
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(100)
    writer.add_eos_token_id(101)
    for name, values in _gguf_tensors().items():
        kind = gguf.GGMLQuantizationType.F32 if "norm" in name else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
