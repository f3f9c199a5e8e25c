"""Compressed checkpoints with a spec a tensor, and their restored twins: more kinds in one model than one run would make."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from swsc_core import encode
from swsc_core.spec import Spec


def compress(source: Path, out: Path, specs: Mapping[str, Spec]) -> tuple[Path, Path]:
    """Write `out`/compressed and `out`/dense: each tensor of `specs` compressed by its spec, and restored."""
    compressed, dense = out / "compressed", out / "dense"
    for directory in (compressed, dense):
        shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    entries: dict[str, Any] = {}
    stored, restored = dict(tensors), dict(tensors)
    for name, spec in specs.items():
        made = encode(tensors[name], [spec], name=name)
        entries[name], restored[name] = made.entry, made.restored
        del stored[name]
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{part}": tensor for part, tensor in made.tensors.items()}
    quantization = {"quant_method": "swsc", "format_version": 2, "tensors": entries}
    (compressed / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(stored, compressed / "model.safetensors", {"format": "pt"})
    save_file(
        {name: tensor.contiguous() for name, tensor in restored.items()}, dense / "model.safetensors", {"format": "pt"}
    )
    return compressed, dense


def greedy(directory: Path, prompt: list[int], tokens: int) -> list[int]:
    """What transformers says next, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    said = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return said[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
