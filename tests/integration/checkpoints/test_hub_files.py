"""Checkpoints as hubs store them.

Names that transformers changes, buffers among the weights, a tied head stored twice.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from jobs.cli import main
from tests.support.tiny import make_text, make_tiny_model

SHORT = ["--calibration-windows", "6", "--calibration-seqlen", "32", "--local", "--preset", "best", "--tune", "0"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return make_text(folder / "calibration.txt", 1500, seed=77), make_text(folder / "test.txt", 1500, seed=5)


def save(model: Any, path: Path, rename: dict[str, str], more: dict[str, torch.Tensor]) -> Path:
    """A model with a tokenizer whose file has `rename`d prefixes of names and holds `more`."""
    make_tiny_model(path, shards=False)
    model.to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for old, new in rename.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors | more, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As openai-community/gpt2: names without the prefix of the loaded model, masks in every layer."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2") / "model", {"transformer.": ""}, masks)


def report_of(output: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((output / "swsc_report.json").read_text())["tensors"]}


def test_a_tensor_that_is_renamed_on_loading_is_found_by_its_values(
    gpt2: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["compress", str(gpt2), str(out), *SHORT, "--bits", "4", "--include", r"c_attn|c_proj|c_fc|wte"]
    assert main([*argv, "--calibration", str(texts[0])]) == 0
    rows = report_of(out)
    assert {name for name, row in rows.items() if row["action"] == "compressed"} == {
        "wte.weight", *(f"h.{n}.{part}.weight" for n in range(2) for part in (
            "attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
        ))
    }  # fmt: skip
    assert main(["evaluate", str(out), "--text", str(texts[1]), "--local", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["seqlen"] == 64  # the default of 2048, cut to n_positions


def test_an_error_of_windows_longer_than_the_position_table_names_its_size(
    gpt2: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(gpt2), str(tmp_path / "out"), "--local", "--bits", "4", "--calibration-windows", "2"]
    message = "64 positions"
    for flags in (["--preset", "data-free"], ["--preset", "fast", "--calibration", str(texts[0])]):
        assert main([*argv, *flags, "--calibration-seqlen", "80"]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(gpt2), "--text", str(texts[1]), "--seqlen", "80", "--local"]) == 2
    assert message in capsys.readouterr().err


def test_a_compression_is_measured_on_windows_of_the_models_positions(
    gpt2: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(gpt2), str(tmp_path / "out"), "--local", "--clusters", "4", "--rank", "1"]
    assert main([*argv, "--text", str(texts[1]), "--windows", "2"]) == 0
    message = capsys.readouterr().out
    assert "note: windows of 64 tokens" in message
    assert "2 windows of 64 tokens" in message


def test_masks_are_neither_counted_nor_written(gpt2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["compress", str(gpt2), str(out), *SHORT, "--bits", "6", "--bits-over", "model", "--include", r"c_|wte"]
    assert main([*argv, "--calibration", str(texts[0])]) == 0
    rows = report_of(out)
    assert {row["action"] for name, row in rows.items() if name.endswith((".attn.bias", ".masked_bias"))} == {
        "left out"
    }
    assert rows["h.0.attn.c_attn.bias"]["action"] == "copied"
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    weights = AutoModelForCausalLM.from_pretrained(gpt2).num_parameters()
    assert 8 * stored / weights == pytest.approx(6, rel=0.25)  # headers are much of so small a file
    assert main(["restore", str(out), str(tmp_path / "dense"), "--local"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_learnt_positions_are_refused_by_name(
    gpt2: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(gpt2), str(tmp_path / "out"), *SHORT, "--bits", "4", "--include", "c_attn|wpe"]
    assert main([*argv, "--calibration", str(texts[0])]) != 0
    error = capsys.readouterr().err
    assert all(fact in error for fact in ("wpe.weight", "gradient", "--exclude"))


def test_a_head_of_another_name_is_calibrated(texts: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = save(GPTNeoXForCausalLM(config), tmp_path / "model", {"lm_head.": "embed_out."}, {})
    assert "embed_out.weight" in load_file(model / "model.safetensors")
    argv = ["compress", str(model), str(tmp_path / "out"), *SHORT, "--bits", "4", "--include", "embed_out|dense"]
    assert main([*argv, "--calibration", str(texts[0])]) == 0
    row = report_of(tmp_path / "out")["embed_out.weight"]
    assert (row["action"], row["calibration_tokens"]) == ("compressed", 6 * 32)


def test_a_tied_head_that_is_stored_twice_stays_tied(texts: tuple[Path, Path], tmp_path: Path) -> None:
    once = make_tiny_model(tmp_path / "once", shards=False)
    twice = Path(shutil.copytree(once, tmp_path / "twice"))
    tensors = load_file(once / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    for model in (once, twice):
        argv = ["compress", str(model), f"{model}-out", *SHORT, "--bits", "6", "--bits-over", "model"]
        assert main([*argv, "--include", "proj|embed_tokens", "--calibration", str(texts[0])]) == 0
    rows = [report_of(Path(f"{model}-out")) for model in (once, twice)]
    assert rows[1]["lm_head.weight"]["action"] == "tied"
    bits = [{name: row.get("bits_per_weight") for name, row in own.items()} for own in rows]
    assert bits[0] == bits[1]
    assert main(["restore", f"{twice}-out", str(tmp_path / "dense"), "--local"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", shards=False)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert main(["compress", str(model), str(tmp_path / "out"), "--local"]) == 0
    assert report_of(tmp_path / "out")["lm_head.weight"]["action"] == "copied"
