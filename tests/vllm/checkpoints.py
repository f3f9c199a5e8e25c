"""Compressed checkpoints with a spec a tensor, and their restored twins.

More kinds in one model than one run would make.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swsc_core import SwscSpec, encode
from swsc_core.method.metric import Metric
from swsc_core.method.spec import Spec
from swsc_core.storage.row_blocks import RowBlocks, remaining_rows


def compress(
    source: Path,
    out: Path,
    specs: Mapping[str, Spec],
    pieces: Mapping[str, RowBlocks] = MappingProxyType({}),
    turned: str = "$.",
) -> tuple[Path, Path]:
    """Write `out`/compressed and `out`/dense: each tensor of `specs` compressed by its spec, and restored.

    Args:
        pieces: X.q.weight -> the rows of X.weight that it is.
        turned: pattern of the tensors that hold inputs as rows.
    """
    compressed, dense = out / "compressed", out / "dense"
    for directory in (compressed, dense):
        shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    restored = {name: tensor.T if re.search(turned, name) else tensor for name, tensor in tensors.items()}
    stored: dict[str, torch.Tensor] = dict(tensors)
    entries: dict[str, Any] = {}
    fused: dict[str, list[RowBlocks]] = {}
    for name, spec in specs.items():
        whole = f"{name.rsplit('.', 2)[0]}.weight" if name in pieces else name
        about: dict[str, Any] = {"transposed": True} if re.search(turned, whole) else {}
        weight = restored[whole]
        if name in pieces:
            rows = pieces[name]
            fused.setdefault(whole, []).append(rows)
            about |= {"tensor": whole, "rows": [rows.first, rows.length, rows.stride, rows.count]}
            weight = rows.take(weight)
        made = encode(weight, [spec], name=name, metric=_metric(spec, weight.shape[1]))
        entries[name] = made.entry.to_json() | about
        if name in pieces:
            restored[whole] = restored[whole].clone()
            pieces[name].put(restored[whole], made.restored)
        else:
            restored[name] = made.restored
            del stored[name]
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{part}": tensor for part, tensor in made.tensors.items()}
    for whole, own in fused.items():
        stored[whole] = restored[whole][remaining_rows(len(restored[whole]), own)]
    restored = {name: tensor.T if re.search(turned, name) else tensor for name, tensor in restored.items()}
    quantization = {"quant_method": "swsc", "format_version": 3, "tensors": entries}
    (compressed / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    for directory, content in ((compressed, stored), (dense, restored)):
        whole_tensors = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(whole_tensors, directory / "model.safetensors", {"format": "pt"})
    return compressed, dense


def _metric(spec: Spec, inputs: int) -> Metric | None:
    """Of inputs some of which are larger than others, for a spec that asks for calibration."""
    if not isinstance(spec, SwscSpec) or spec.metric == "weights":
        return None
    seen = torch.randn(512, inputs, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, inputs)
    return Metric(seen.T @ seen / len(seen), tokens=len(seen))


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 250) for _ in range(length)] for length in (5, 17, 40)]


def by_transformers(
    directory: Path, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens after each prompt, and the log likelihood of each token of the prompt, in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # nor does vLLM stop there
    tokens_of, likely = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        tokens_of.append(out[0, len(prompt) :].tolist())
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        likely.append(logs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return tokens_of, likely


def by_vllm(
    directory: Path, prompts: list[list[int]], tokens: int, ranks: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The same by vLLM, on `ranks` processes."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory), dtype="float32", tensor_parallel_size=ranks, max_model_len=128, max_num_seqs=4,
        enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=0)
    try:
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    tokens_of = [list(one.outputs[0].token_ids) for one in done]
    likely = [
        [at[token].logprob for at, token in zip(one.prompt_logprobs[1:], prompt[1:], strict=True)]
        for one, prompt in zip(done, prompts, strict=True)
    ]
    return tokens_of, likely


def require_equal_tokens(compressed: Path, dense: Path, ranks: int) -> None:
    """Assert that vLLM with `compressed` and transformers with `dense` agree in tokens and likelihoods."""
    expected, likely = by_transformers(dense, prompts(), 16)
    tokens_of, found = by_vllm(compressed, prompts(), 16, ranks)
    assert tokens_of == expected
    for ours, theirs in zip(found, likely, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
