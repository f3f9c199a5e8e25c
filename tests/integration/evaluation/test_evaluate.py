"""Perplexity: equal to a plain loop over the same windows, loud about what is not finite."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from pipeline.checkpoints.matrix_info import MatrixInfo, whole_matrix
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import Payload
from pipeline.compression.job import CompressionVariant, CompressVariants
from pipeline.engine.worker import Worker
from pipeline.evaluation.job import MeasureLosses
from pipeline.evaluation.perplexity import perplexity
from pipeline.models.loading import ModelKey
from pipeline.storage.store import Store
from swsc_core import SwscSpec
from tests.support.tiny import make_tiny_model


def evaluate(model: Path, text: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    argv = [
        "evaluate",
        str(model),
        "--text",
        str(text),
        "--seqlen",
        "64",
        "--local",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert main([*argv, *flags]) == 0
    return json.loads((tmp_path / "r.json").read_text())


def plain_loop(directory: Path, text: Path, seqlen: int) -> float:
    """Perplexity as anyone would write it with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(text.read_text(), return_tensors="pt").input_ids[0]
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[None, start : start + seqlen]
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


def test_equals_a_plain_transformers_loop(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_model, text, tmp_path)
    assert result["windows"] == 2000 // 64
    assert result["perplexity"] == pytest.approx(plain_loop(tiny_model, text, 64), rel=1e-6)


def test_every_figure_that_perplexity_depends_on_is_printed(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(tiny_model, text, tmp_path, "--windows", "3")
    assert result["windows"] == len(result["nll_per_window"]) == 3
    assert math.exp(math.fsum(result["nll_per_window"]) / 3) == result["perplexity"]
    assert (result["seqlen"], result["dtype"], result["bos"]) == (64, "float32", "none")
    assert len(result["text_sha256"]) == 64
    printed = capsys.readouterr().out
    assert result["text_sha256"][:16] in printed
    assert "3 windows of 64 tokens" in printed


def test_a_window_has_the_same_loss_in_any_company(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    few, many = (evaluate(tiny_model, text, tmp_path, "--windows", count)["nll_per_window"] for count in ("3", "30"))
    assert few == many[:3]


def test_compressed_restored_and_dense_forms_measure_the_same(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    for name, flags in (("compact", []), ("dense", ["--format", "dense"])):
        assert main(["compress", str(tiny_model), str(tmp_path / name), "--local", *flags]) == 0
    assert main(["restore", str(tmp_path / "compact"), str(tmp_path / "restored"), "--local"]) == 0
    losses = [evaluate(tmp_path / name, text, tmp_path)["nll_per_window"] for name in ("compact", "dense", "restored")]
    assert losses[0] == losses[1] == losses[2]
    assert losses[0] != evaluate(tiny_model, text, tmp_path)["nll_per_window"]


def test_compress_measures_too_when_a_text_is_given(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", str(text), "--seqlen", "64", "--windows", "2"]
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", *flags]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_window_that_is_not_finite_fails_the_run_and_is_named(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_model(tmp_path / "model", shards=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded.get_input_embeddings().weight.data[3] = float("nan")  # the token of the text's first word, or of a later one
    loaded.save_pretrained(model)
    argv = ["evaluate", str(model), "--text", str(text), "--seqlen", "64", "--local"]
    assert main(argv) == 1
    assert "the loss of window" in capsys.readouterr().err


def test_the_first_bad_window_is_the_one_that_is_named() -> None:
    with pytest.raises(Exception, match="window 1 is nan"):
        perplexity([2.0, math.nan, math.inf], "model")


def test_a_model_with_a_missing_weight_is_not_filled_with_random_numbers(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_tiny_model(tmp_path / "model", shards=False)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", str(model), "--text", str(text), "--seqlen", "64", "--local"]) == 2


def compressed_on(worker: Worker, source: Store, info: MatrixInfo) -> Payload:
    (payload,) = worker.run(CompressVariants(source, info, (CompressionVariant((SwscSpec(3, 1),), 0),))).payloads
    return payload


def test_a_swap_that_fails_half_way_leaves_no_trace_in_later_ones(tiny_model: Path) -> None:
    worker, source = Worker(1, "cpu"), open_checkpoint(str(tiny_model))
    key, windows = ModelKey(str(tiny_model), "float32", 1), np.arange(64).reshape(2, 32)
    names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qk"]
    good, bad = (compressed_on(worker, source.store, whole_matrix(source.tensors[name])) for name in names)
    before = worker.run(MeasureLosses(key, windows)).value.losses
    with pytest.raises(KeyError):
        worker.run(MeasureLosses(key, windows, "broken", tuple(names)), good, replace(bad, parts=bad.parts[:1]))
    assert worker.run(MeasureLosses(key, windows)).value.losses == before


def test_swapping_variants_in_and_out_leaves_the_model_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    worker, source = Worker(1, "cpu"), open_checkpoint(str(tiny_model))
    key, windows = ModelKey(str(tiny_model), "float32", 1), np.arange(64).reshape(2, 32)
    name = "model.layers.0.self_attn.q_proj.weight"
    payload = compressed_on(worker, source.store, whole_matrix(source.tensors[name]))
    before = worker.run(MeasureLosses(key, windows)).value.losses
    swapped = worker.run(MeasureLosses(key, windows, "three", (name,)), payload).value.losses
    after = worker.run(MeasureLosses(key, windows)).value.losses
    assert before == after != swapped


def test_windows_are_no_longer_than_the_models_context_by_default(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "evaluate",
        str(tiny_model),
        "--text",
        str(text),
        "--windows",
        "1",
        "--local",
        "--json",
        str(tmp_path / "r.json"),
    ]
    for flags, length, message in (
        ([], 256, "note: windows of 256 tokens"),
        (["--seqlen", "300"], 300, "note: windows of 300 tokens"),
    ):
        assert main([*argv, *flags]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["seqlen"] == length
        assert message in capsys.readouterr().out
