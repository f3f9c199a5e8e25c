"""`swsc evaluate --memory-per-worker`: the same figures in blocks as with the whole model, wherever its files are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from jobs.cli import main
from pipeline.blocks import reader
from pipeline.blocks.layout import LayerSizes
from pipeline.evaluation import flow
from pipeline.models.stored_model import open_model
from pipeline.planning.memory import block_memory
from tests.integration.checkpoints.test_quantized_sources import fp8_model
from tests.support.blocks import model_key
from tests.support.object_store import BUCKET, as_client, object_store, upload
from tests.support.tiny import make_tiny_model, save_tokenizer
from tests.support.tiny_gguf import make_tiny_gguf

SEQLEN, WINDOWS = 32, 9  # shards of 4 windows, and a smaller one


def cap_of(model: str) -> float:
    """GiB for the largest unit of a model and what its evaluation needs besides."""
    source = open_model(model)
    working = block_memory(source, "float32", SEQLEN, 4 * SEQLEN).cpu
    sizes = LayerSizes.of(source, model_key(model), "cpu")
    return (working + 2 * sizes.fused + max(sizes.held("cpu")) + 512) / 2**30


def evaluate(model: str, text: Path, folder: Path, *flags: str) -> dict[str, Any]:
    protocol = ["--text", str(text), "--seqlen", str(SEQLEN), "--windows", str(WINDOWS), "--local"]
    assert main(["evaluate", model, *protocol, "--json", str(folder / "r.json"), *flags]) == 0
    result: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.fixture
def blocks_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of blocks of each evaluation in blocks."""
    counts: list[int] = []
    real = flow.measure_in_blocks

    def measure(key: Any, layout: Any, *rest: Any) -> None:
        counts.append(len(layout.blocks))
        real(key, layout, *rest)

    monkeypatch.setattr(flow, "measure_in_blocks", measure)
    return counts


def tied(folder: Path) -> str:
    return str(make_tiny_model(folder / "tied", layers=4))


def untied_values(folder: Path) -> str:
    """A model whose class ties embedding and head, and whose files have different ones."""
    model = make_tiny_model(folder / "untied", layers=4, shards=False)
    tensors = load_file(model / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    save_file({**tensors, **head}, model / "model.safetensors", {"format": "pt"})
    return str(model)


def fp8(folder: Path) -> str:
    fp8_model(folder / "fp8", (48, 40))
    save_tokenizer(folder / "fp8")
    return str(folder / "fp8")


def compressed(folder: Path) -> str:
    assert main(["compress", tied(folder), str(folder / "out"), "--clusters", "4", "--rank", "2", "--local"]) == 0
    return str(folder / "out")


def gguf(folder: Path) -> str:
    return str(make_tiny_gguf(folder / "tiny.gguf"))


@pytest.mark.parametrize("make", [tied, untied_values, fp8, compressed, gguf], ids=lambda make: make.__name__)
def test_a_capped_evaluation_equals_an_uncapped_one(
    make: Callable[[Path], str], text: Path, tmp_path: Path, blocks_used: list[int]
) -> None:
    model = make(tmp_path)
    whole = evaluate(model, text, tmp_path)
    assert blocks_used == []
    assert evaluate(model, text, tmp_path, "--memory-per-worker", repr(cap_of(model))) == whole
    assert blocks_used[0] > 1


def test_a_capped_evaluation_of_a_model_in_an_object_store_equals_an_uncapped_one_of_its_copy(
    tiny_model: Path, text: Path, tmp_path: Path, blocks_used: list[int]
) -> None:
    whole = evaluate(str(tiny_model), text, tmp_path)
    with object_store(tmp_path / "s3") as server, as_client(server, alone=True):
        remote = upload(tiny_model, f"{BUCKET}/tiny")
        capped = evaluate(remote, text, tmp_path, "--memory-per-worker", repr(cap_of(remote)))
    assert capped == {**whole, "model": remote}
    assert blocks_used[0] > 1


def test_a_verified_model_is_compared_with_its_hashes_in_blocks_too(
    tiny_model: Path, text: Path, tmp_path: Path, blocks_used: list[int]
) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--clusters", "4", "--local"]) == 0
    flags = ["--verify", "--memory-per-worker", repr(cap_of(str(tmp_path / "out")))]
    assert evaluate(str(tmp_path / "out"), text, tmp_path, *flags) == evaluate(str(tmp_path / "out"), text, tmp_path)
    assert len(blocks_used) == 1


def test_a_cap_below_the_largest_layer_ends_in_one_line_before_a_weight_is_read(
    tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(reader, "read_tensor", read)
    argv = ["evaluate", str(tiny_model), "--text", str(text), "--seqlen", "32", "--local"]
    assert main([*argv, "--memory-per-worker", "0.1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0.1 GB, but the largest layer needs" in line
    assert "raise --memory-per-worker" in line


def test_gemma_3n_with_shared_keys_and_values_is_refused_with_the_reason(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t: Any = transformers
    config = t.Gemma3nTextConfig(
        vocab_size=256, vocab_size_per_layer_input=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, altup_active_idx=0,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0,
    )  # fmt: skip
    model = str(tmp_path / "gemma3n")
    t.Gemma3nForCausalLM(config).save_pretrained(model)
    save_tokenizer(Path(model))
    evaluate(model, text, tmp_path)
    capsys.readouterr()
    argv = ["evaluate", model, "--text", str(text), "--seqlen", "32", "--windows", "2", "--local"]
    assert main([*argv, "--memory-per-worker", repr(cap_of(model))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Gemma3nForCausalLM cannot run in blocks of layers" in line
