"""Mixtures of experts, whose matrices transformers joins when it loads them, and embeddings.

Calibrated, compressed, tuned.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from jobs.cli import main
from pipeline.calibration.gather import Calibrator
from pipeline.errors import CheckpointError
from pipeline.models.loading import ModelKey
from pipeline.models.parameter_lookup import find_parameter
from pipeline.models.stored_model import open_model
from tests.support.tiny import WORDS, make_text

SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN: dict[str, Any] = {"moe_intermediate_size": 48, "num_experts": 4, "head_dim": 16}
KINDS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SHAPE, intermediate_size=96, num_local_experts=4)),
    "qwen": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **_QWEN)),
}
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.{}.weight",
    "qwen": "model.layers.1.mlp.experts.2.{}.weight",
}
PARTS = {"mixtral": ("w1", "w3", "w2"), "qwen": ("gate_proj", "up_proj", "down_proj")}
CALIBRATION = ["--calibration-windows", "16", "--calibration-seqlen", "32"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind) / "model"
    build, config = KINDS[kind]
    torch.manual_seed(0)
    build(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_model / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 1500, seed=77)


def test_an_expert_is_found_by_its_values(kind: str, model: Path) -> None:
    source, loaded = open_model(str(model)), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for part in PARTS[kind]:
        name = EXPERT[kind].format(part)
        weight = source.read(name)
        view = find_parameter(loaded, name, weight, "m")
        assert view.expert == 2
        assert torch.equal(view.of(view.parameter), weight.float())
    with pytest.raises(CheckpointError, match=r"m: the loaded model has no parameter for .*; --exclude it"):
        find_parameter(loaded, name, weight + 1, "m")


def test_hessians_of_an_expert_are_those_of_the_tokens_routed_to_it(kind: str, model: Path) -> None:
    """Against a forward pass of the expert written out, on the tokens that the router chose it for."""
    names = [EXPERT[kind].format(part) for part in PARTS[kind]]
    window = np.arange(40)[None] % 250
    sums = Calibrator(ModelKey(str(model), "float32", 1), "cpu").gather(names, window, 0, 0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: dict[str, Any] = {}
    loaded.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.update(x=args[0], chosen=args[1]))
    with torch.no_grad():
        loaded(input_ids=torch.from_numpy(window))
    inputs = seen["x"][(seen["chosen"] == 2).any(dim=-1)]
    gate, up = (inputs @ open_model(str(model)).read(name).float().T for name in names[:2])
    for name, x in ((names[0], inputs), (names[2], torch.nn.functional.silu(gate) * up)):
        assert sums[name].tokens == len(x) > 0
        assert sums[name].owner == name
        torch.testing.assert_close(sums[name].plain, x.T @ x, rtol=1e-4, atol=1e-4)
    assert (sums[names[1]].owner, sums[names[1]].plain) == (names[0], None)
    assert float(sums[names[1]].rows.sum()) > 0


def test_hessians_of_an_embedding_count_lookups_and_gradients(model: Path) -> None:
    """The gradient by a row of the embedding is the sum of those of its lookups."""
    name, window = "model.embed_tokens.weight", np.array([[5, 7, 5, 9, 5, 11]])
    key = ModelKey(str(model), "float32", 1)
    sums = Calibrator(key, "cpu").gather([name], window, 0, 0)[name]
    assert sums.rows.nonzero()[:, 0].tolist() == [5, 7, 9, 11]
    assert sums.rows[5] == 3
    reference = Calibrator(key, "cpu")
    weight = reference._model.get_input_embeddings().weight.requires_grad_()
    reference._backward(window[0], torch.Generator().manual_seed(0))
    once = weight.grad[[7, 9, 11]]  # looked up once: theirs is the gradient of one token
    total = sums.weighted.diagonal().sum()
    assert float(total) > float(once.square().sum()) > 0
    assert sums.plain is not None
    assert torch.equal(sums.weighted, sums.plain)


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D, y = x W: rows of W are inputs; Q, K and V are fused side by side."""
    path = tmp_path_factory.mktemp("gpt2") / "model"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((tiny_model / file).read_bytes())
    return path


def test_hessians_of_transposed_and_fused_matrices_are_those_of_inputs_and_of_their_own_outputs(gpt2: Path) -> None:
    module = "transformer.h.1.attn.c_attn"
    names = [f"{module}.{role}.weight" for role in "qkv"]
    window = np.arange(20)[None]
    calibrator = Calibrator(ModelKey(str(gpt2), "float32", 1), "cpu")
    seen: dict[str, Any] = {}

    def note(module: Any, arguments: Any, output: torch.Tensor) -> None:
        seen["x"] = arguments[0][0]
        output.register_hook(lambda gradient: seen.update(g=gradient[0]))

    calibrator._model.get_submodule(module).register_forward_hook(note)
    sums = calibrator.gather(names, window, 0, 0)
    x, gradients = seen["x"], dict(zip(names, seen["g"].split(32, dim=1), strict=True))
    torch.testing.assert_close(sums[names[0]].plain, x.T @ x)
    for name, g in gradients.items():
        torch.testing.assert_close(sums[name].rows, g.square().sum(dim=0))
        torch.testing.assert_close(sums[name].weighted, (x * g.square().sum(dim=1, keepdim=True)).T @ x)
    assert [sums[name].owner for name in names] == [names[0]] * 3


def test_transposed_and_fused_matrices_are_compressed_and_tuned(gpt2: Path, calibration: Path, tmp_path: Path) -> None:
    """Tied and learnt embeddings beside them stay as they are."""
    flags = ["--preset", "best", "--bits", "4", "--include", r"c_attn|c_proj|c_fc", *CALIBRATION, "--local"]
    argv = ["compress", str(gpt2), str(tmp_path / "out"), "--calibration", str(calibration)]
    assert main([*argv, *flags]) == 0
    report = json.loads((tmp_path / "out" / "swsc_report.json").read_text())
    rows = [row for row in report["tensors"] if row["action"] == "compressed"]
    assert len(rows) == 2 * (3 + 3)
    assert {row["name"]: row["shape"] for row in rows}["transformer.h.0.mlp.c_fc.weight"] == [128, 32]
    assert report["tuning"]["steps"] > 0


def test_a_sweep_swaps_pieces_in_and_out(gpt2: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "variants:\n- {name: coarse, projectors: 'q,up', clusters: 4, rank: 1}\n"
        f"evaluations:\n- {{text: {text}, seqlen: 32, windows: 4}}\n"
    )
    assert main(["sweep", str(config), "--model", str(gpt2), "--out", str(tmp_path / "sweep"), "--local"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]}
    flags = ["--projectors", "q,up", "--clusters", "4", "--rank", "1", "--local"]
    assert main(["compress", str(gpt2), str(tmp_path / "out"), *flags]) == 0
    argv = ["evaluate", str(tmp_path / "out"), "--text", str(text), "--seqlen", "32", "--windows", "4", "--local"]
    assert main([*argv, "--json", str(tmp_path / "measured.json")]) == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["perplexity"]
    assert rows["coarse"]["perplexity"] == pytest.approx(measured, rel=1e-6)
    assert rows["coarse"]["perplexity"] != rows["uncompressed"]["perplexity"]


def test_all_of_it_is_compressed_tuned_and_measured(
    kind: str, model: Path, calibration: Path, text: Path, tmp_path: Path
) -> None:
    output, measured = tmp_path / "out", tmp_path / "measured.json"
    what = ["--preset", "best", "--bits", "3.5", "--include", "experts|_proj|embed|lm_head"]
    argv = ["compress", str(model), str(output), "--local", "--calibration", str(calibration), *CALIBRATION]
    assert main([*argv, *what]) == 0
    report = json.loads((output / "swsc_report.json").read_text())
    assert report["share_of_weights_compressed"] > 0.98
    assert report["compressed_bits_per_weight"] <= 3.5
    assert report["tuning"]["steps"] > 0
    rows = {row["name"]: row for row in report["tensors"] if row["action"] == "compressed"}
    assert sum("experts" in name for name in rows) == 24
    assert all(row["calibration_tokens"] > 0 for row in rows.values())
    argv = ["evaluate", str(output), "--text", str(text), "--seqlen", "32", "--windows", "4", "--local"]
    assert main([*argv, "--json", str(measured)]) == 0
    assert json.loads(measured.read_text())["perplexity"] > 0


def test_a_sweep_swaps_experts_in_and_out(
    kind: str, model: Path, calibration: Path, text: Path, tmp_path: Path
) -> None:
    """What is swapped into a loaded model is what a directory of the same would hold."""
    config, output = tmp_path / "sweep.yaml", tmp_path / "out"
    config.write_text(
        "variants:\n- {name: coarse, include: experts, clusters: 4, rank: 1}\n"
        f"evaluations:\n- {{text: {text}, seqlen: 32, windows: 4}}\n"
    )
    assert main(["sweep", str(config), "--model", str(model), "--out", str(tmp_path / "sweep"), "--local"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]}
    flags = ["--include", "experts", "--clusters", "4", "--rank", "1", "--format", "dense", "--local"]
    assert main(["compress", str(model), str(output), *flags]) == 0
    argv = ["evaluate", str(output), "--text", str(text), "--seqlen", "32", "--windows", "4", "--local"]
    assert main([*argv, "--json", str(tmp_path / "measured.json")]) == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["perplexity"]
    assert rows["coarse"]["perplexity"] == pytest.approx(measured, rel=1e-6)
    assert rows["coarse"]["perplexity"] != rows["uncompressed"]["perplexity"]


def test_an_expert_that_no_token_reached_gets_the_least(kind: str, model: Path, tmp_path: Path) -> None:
    """The router is made to send all tokens to experts 0 and 1; the report names the experts that no token reached."""
    from safetensors.torch import load_file, save_file

    skewed = tmp_path / "model"
    skewed.mkdir()
    for file in model.iterdir():
        (skewed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(skewed / "model.safetensors")
    for name, router in tensors.items():
        if name.endswith(".gate.weight"):
            router[:] = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    for name in list(tensors):
        if "layernorm" in name:
            tensors[name] = tensors[name].abs()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].abs() + 1
    save_file(tensors, skewed / "model.safetensors", {"format": "pt"})
    words = tmp_path / "words.txt"
    words.write_text(" ".join(WORDS * 3), encoding="utf-8")
    flags = ["--preset", "fast", "--bits", "3", "--include", r"layers\.0.*experts", "--calibration-seqlen", "32"]
    argv = ["compress", str(skewed), str(tmp_path / "out"), "--local", "--calibration", str(words)]
    assert main([*argv, *flags, "--calibration-windows", "4"]) == 0
    report = json.loads((tmp_path / "out" / "swsc_report.json").read_text())
    rows = [row for row in report["tensors"] if row["action"] == "compressed"]
    idle = [row for row in rows if row["calibration_tokens"] == 0]
    assert 0 < len(idle) < len(rows)
    assert max(row["bits_per_weight"] for row in idle) < min(
        row["bits_per_weight"] for row in rows if row["calibration_tokens"] > 0
    )
