"""Families whose modules do more with a weight than call its layer, opened.

Those layers are dense, the logits those of the restored model.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import swsc_core.hf
from jobs.cli import main
from swsc_core import SwscLinear
from swsc_core.hf.source_reads import uses_of

t: Any = transformers  # its config classes take more arguments than their annotations name

_SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
_MAMBA: dict[str, Any] = {**_SHAPE, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_LONGCAT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "ffn_hidden_size": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "moe_topk": 2,
    "n_routed_experts": 4, "zero_expert_num": 1, "expert_ffn_hidden_size": 24, "initializer_range": 0.2,
}  # fmt: skip
# one centroid, rank 1: a weight of one row is multiplied with anything without a complaint
_CLUSTERS = ["--clusters", "1", "--rank", "1", "--n-init", "1"]
_CODES = ["--method", "rtn", "--bits", "4", "--granularity", "tensor"]
# With rank 1, a feed-forward block gives nearly zero for some tokens, and the norm that follows makes its rounding
# large: logits of the restored model itself move by 3e-3 if its weights are changed by 1e-7.
_RANKS = {"gemma3n": ["--rank", "4"]}
FAMILIES: dict[str, tuple[Any, str]] = {
    "mamba": (
        lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2)
        ),
        r"mixer\.(x|dt|out)_proj",
    ),
    "falcon_h1": (
        lambda: t.FalconH1ForCausalLM(
            t.FalconH1Config(**_MAMBA, head_dim=8, mamba_d_ssm=64, mamba_expand=2, pad_token_id=0)
        ),
        r"mamba\.out_proj",
    ),
    "rwkv": (
        lambda: t.RwkvForCausalLM(t.RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)),
        r"attention\.output|feed_forward\.value",
    ),
    "a tied head with a bias": (
        lambda: t.CTRLLMHeadModel(
            t.CTRLConfig(vocab_size=128, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4, initializer_range=0.2)
        ),
        r"lm_head|transformer\.w$",
    ),
    "longcat_flash": (lambda: t.LongcatFlashForCausalLM(t.LongcatFlashConfig(**_LONGCAT)), r"router\.classifier"),
    "gemma3n": (
        lambda: t.Gemma3nForCausalLM(
            t.Gemma3nTextConfig(
                **_SHAPE, head_dim=8, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, laurel_rank=8,
                num_kv_shared_layers=0, layer_types=["full_attention"] * 2, pad_token_id=0,
            )
        ),
        r"altup\.(prediction|correction)_coefs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", [_CLUSTERS, _CODES], ids=["one centroid", "packed codes"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_restored_model(name: str, flags: list[str], tmp_path: Path) -> None:
    make, dense = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    what = [
        "--include",
        r"layers|blocks|lm_head|head\.|transformer\.",
        "--exclude",
        r"embed_tokens|experts",
        "--local",
        *flags,
        *_RANKS.get(name if flags is _CLUSTERS else "", []),
    ]
    assert main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), *what]) == 0
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    opened, restored = (type(model).from_pretrained(tmp_path / place).eval() for place in ("out", "dense"))
    with torch.no_grad():
        found, expected = (one(torch.arange(3, 27)[None], use_cache=False).logits for one in (opened, restored))
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    compressed = {path for path, layer in opened.named_modules() if isinstance(layer, SwscLinear)}
    assert compressed
    assert not any(re.search(dense, path) for path in compressed)
    assert any(re.search(dense, path) for path, _ in opened.named_modules())


def test_a_layer_that_has_to_be_dense_is_refused_when_a_model_is_compressed_on_load(tmp_path: Path) -> None:
    FAMILIES["mamba"][0]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mixer\.dt_proj has to stay dense"):
        t.MambaForCausalLM.from_pretrained(
            tmp_path, quantization_config=swsc_core.hf.SwscConfig(bits=6, include="dt_proj")
        )


_READ = re.compile(r"\bself\.(?P<chain>\w+(?:\.\w+)*)\.weight\b(?!\.(?:dtype|device)\b)(?!\s*=[^=])")
_SETUP = re.compile(r"__init__|_?init_|_?reset_|_?tie_|get_|set_|_?resize|load_|_load|_freeze|freeze")


def readers() -> Iterator[tuple[str, str, str]]:
    """(file, class, chain) of every line in transformers whose module reads the weight of a child."""
    for file in sorted((Path(t.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "ForCausalLM" not in text and "ForConditionalGeneration" not in text:
            continue
        if not _READ.search(text):
            continue
        for kind in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            for method in (node for node in kind.body if isinstance(node, ast.FunctionDef)):
                source = "" if _SETUP.match(method.name) else ast.unparse(method)
                for found in _READ.finditer(re.sub(r"isinstance\([^)]*\)", "", source)):
                    yield f"transformers.models.{file.parent.name}.{file.stem}", kind.name, found["chain"]


def test_every_reader_in_transformers_is_found() -> None:
    """A cruder reading of the same files: what follows `.weight` on a line. Some 80 places in transformers 5."""
    lines = set(readers())
    assert len(lines) > 60
    missed = [
        (file, kind, chain)
        for file, kind, chain in lines
        if ("self", *chain.split("."), "weight") not in _chains(getattr(importlib.import_module(file), kind))
    ]
    assert not missed


def _chains(kind: type) -> set[tuple[str, ...]]:
    found = uses_of(kind)
    assert found is not None
    return {use.chain[: use.chain.index("weight", 2) + 1] for use in found if "weight" in use.chain[2:]}


@pytest.mark.parametrize("kind", ["wav2vec2", "clip"])
def test_a_model_that_embeds_no_tokens_is_opened_and_saved(kind: str, tmp_path: Path) -> None:
    """transformers raises where such a model is asked for the layer that embeds tokens."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    if kind == "wav2vec2":
        convolutions = {"conv_dim": [16, 16], "conv_kernel": [3, 3], "conv_stride": [2, 2]}
        positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
        model: Any = t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**small, **convolutions, **positions, vocab_size=32))
        given = {"input_values": torch.randn(1, 400)}
    else:
        text = {**small, "vocab_size": 99, "max_position_embeddings": 20, "projection_dim": 16}
        vision = {**small, "image_size": 16, "patch_size": 8, "projection_dim": 16}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        given = {"input_ids": torch.arange(9)[None], "pixel_values": torch.randn(1, 3, 16, 16)}
    model.save_pretrained(tmp_path / "model")
    flags = ["--include", r"(q|k)_proj\.weight", "--method", "rtn", "--bits", "8", "--local"]
    assert main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), *flags]) == 0
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    opened = type(model).from_pretrained(tmp_path / "out")
    opened.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        one, two, expected = (
            type(model).from_pretrained(tmp_path / name).eval()(**given)[0] for name in ("out", "saved", "dense")
        )
    assert torch.allclose(one, expected, atol=1e-4)
    assert torch.equal(one, two)
