"""GGUF in: a file made here by llama.cpp's own package, dequantized into a checkpoint that the other verbs read."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from tests.support.families import tensors_of
from tests.support.tiny_gguf import INNER, Q8, make_tiny_gguf, tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(file: Path) -> Path:
    target = file.parent / "converted"
    assert main(["convert", str(file), str(target)]) == 0
    return target


def test_the_weights_are_what_the_file_stands_for(converted: Path) -> None:
    found = tensors_of(converted)
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.bfloat16"}
    assert len(found) == len(tensors())
    pairs = {"token_embd": "model.embed_tokens", "blk.1.ffn_down": "model.layers.1.mlp.down_proj", "output": "lm_head"}
    for theirs, ours in pairs.items():
        values = gguf.quants.dequantize(gguf.quants.quantize(tensors()[f"{theirs}.weight"], Q8), Q8)
        assert torch.equal(found[f"{ours}.weight"], torch.from_numpy(values).to(torch.bfloat16)), ours


def test_it_prints_what_was_dequantized(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "21 tensors (5 F32, 16 Q8_0) as float32 safetensors" in printed
    assert "dequantized from Q8_0" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_comes_out_is_opened_and_compressed_as_any_other_model(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert AutoTokenizer.from_pretrained(converted)("!#").input_ids
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
    assert main(["compress", str(converted), str(tmp_path / "out"), "--clusters", "4", "--rank", "2", "--local"]) == 0


@pytest.mark.parametrize("damage", ["absent", "foreign", "truncated", "a directory"])
def test_what_is_no_gguf_file_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    given = tmp_path / "given.gguf"
    if damage == "a directory":
        given.mkdir()
    elif damage != "absent":
        given.write_bytes(b"pickle" if damage == "foreign" else file.read_bytes()[:5000])
    assert main(["convert", str(given), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {given}: ")
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_that_holds_something_is_left_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    for target, expected in ((str(tmp_path), "not empty"), ("s3://bucket/model", "local directories only")):
        assert main(["convert", str(file), target]) == 2
        assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"without": "blk.1.ffn_down.weight"}, "model.layers.1.mlp.down_proj.weight is missing"),
        ({"inner": 2 * INNER}, "model.layers.0.mlp.down_proj.weight has the shape [64, 96], expected [64, 192]"),
    ],
)
def test_a_file_that_lacks_weights_is_refused_and_nothing_is_drawn_at_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any], expected: str
) -> None:
    file = make_tiny_gguf(tmp_path / "part.gguf", **how)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["part.gguf"]
    assert main(["plan", str(file), "--clusters", "4", "--rank", "2"]) == 2
    assert "of a kind that transformers cannot read from GGUF" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["out/", "sub/../out", "new/deep/out"])
def test_the_place_may_be_written_in_any_way(
    file: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(file), target]) == 0
    assert (tmp_path / target.replace("sub/../", "") / "config.json").is_file()
