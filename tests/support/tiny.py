"""A tiny Llama with a tokenizer, and texts for it, generated from seeds."""

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(250)]


def make_tiny_model(
    path: Path, *, layers: int = 3, seed: int = 0, tied: bool = True, shards: bool = True, head_dim: int = 16,
    bias: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Path:  # fmt: skip
    """Save a random Llama with hidden size 64 and rectangular projections, in shards that split layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
        head_dim=head_dim, attention_bias=bias,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(path, max_shard_size="60KB" if shards else "1GB")
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Save a tokenizer of 253 words beside a model."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def make_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """Write a text of `words` random words of the tiny tokenizer's vocabulary."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """The content of every file of a finished output, except the report, which holds times."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file() and p.name != "swsc_report.json"}


def moved(model: Path, target: Path, offset: int) -> Path:
    """A copy of a model whose tensor data start `offset` bytes (a multiple of 8) after a 64-byte boundary."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end].rstrip(b" ")
        header += b" " * ((offset - 8 - len(header)) % 64)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    return target
