"""GGUF in: a file made here by llama.cpp's own package, dequantized into a checkpoint that the other verbs read."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from tests.families import tensors_of

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 64, 96, 2, 4, 128
Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def tensors() -> dict[str, np.ndarray]:
    """A tiny Llama's weights, by the names of GGUF."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_{role}.weight": (HIDDEN, HIDDEN) for role in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{role}.weight": (INNER, HIDDEN) for role in ("gate", "up")}
        shapes |= {f"{block}.ffn_down.weight": (HIDDEN, INNER)}
    made = {name: (0.2 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"blk.{layer}.{kind}_norm.weight" for layer in range(LAYERS) for kind in ("attn", "ffn")]
    return made | {name: np.ones(HIDDEN, np.float32) for name in (*norms, "output_norm.weight")}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights in 8 bits, norms in 32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    letters, joined = [chr(0x21 + number) for number in range(90)], ['!"', "#$"]
    writer.add_token_list([*letters, *joined, *(f"<{number}>" for number in range(VOCABULARY - 92))])
    writer.add_token_merges([" ".join(pair) for pair in joined])
    writer.add_bos_token_id(100)
    writer.add_eos_token_id(101)
    for name, values in tensors().items():
        kind = F32 if "norm" in name else Q8
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_it_says_what_was_dequantized(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "21 tensors (5 F32, 16 Q8_0) as float32 safetensors" in said
    assert "dequantized from Q8_0" in said
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
    said = capsys.readouterr().err
    assert said.startswith(f"error: {given}: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_that_holds_something_is_left_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    for target, wanted in ((str(tmp_path), "not empty"), ("s3://bucket/model", "on this machine only")):
        assert main(["convert", str(file), target]) == 2
        assert wanted in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
