"""Sources that are quantized already: fp8 is read as what it means, everything else is refused with what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.models.stored_model import open_model
from tests.support.families import tensors_of


def by_block(weight: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """fp8 values and float32 scales, one a block.

    The last blocks are cut off where the size does not divide the shape.
    """
    rows, columns = weight.split(size[0]), [row.split(size[1], dim=1) for row in weight.split(size[0])]
    scales = torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in columns])
    values = [
        torch.cat([b / s for b, s in zip(row, own, strict=True)], 1) for row, own in zip(columns, scales, strict=True)
    ]
    assert len(rows) == len(scales)
    return torch.cat(values).to(torch.float8_e4m3fn), scales


def meant(values: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
    """The product of codes and scales, block by block."""
    dense = torch.empty(values.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            dense[block] = values[block].float() * scales[i, j]
    return dense.to(torch.bfloat16)


def fp8_model(path: Path, size: tuple[int, int]) -> dict[str, Tensor]:
    """A tiny Qwen3 stored as DeepSeek-V3 and Qwen3-FP8 are; returns its weights as they are meant."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    tensors, expected = load_file(path / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        expected[name] = tensor
        if "_proj" in name:
            values, scales = by_block(tensor.float(), size)
            tensors |= {name: values, f"{name}_scale_inv": scales}
            expected[name] = meant(values, scales, size)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    set_quantization(path, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(size)})
    return expected


def set_quantization(path: Path, quantization: dict[str, Any] | None) -> None:
    """Write the quantization of a model to config.json."""
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    (path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantization} if quantization else {}))
    )


@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=["whole blocks", "cut blocks"])
def test_block_scaled_fp8_is_read_as_bfloat16(tmp_path: Path, size: tuple[int, int]) -> None:
    expected = fp8_model(tmp_path / "fp8", size)
    source = open_checkpoint(str(tmp_path / "fp8"))
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.tensors[name].dtype == "BF16"
        assert torch.equal(read_tensor(source.store, source.tensors[name]), tensor), name
    assert "quantization_config" not in source.config
    assert source.nbytes == sum(2 * tensor.numel() for tensor in expected.values())


def test_what_is_read_is_what_transformers_reads(tmp_path: Path) -> None:
    fp8_model(tmp_path / "fp8", (32, 32))
    how = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)  # which a GPU would keep as fp8
    theirs = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=how
    ).state_dict()
    ours = open_model(str(tmp_path / "fp8"))
    assert theirs.keys() == set(ours.names)
    for name in ours.names:
        assert torch.equal(ours.read(name), theirs[name]), name


def test_an_fp8_model_is_compressed_restored_and_measured_as_its_bfloat16_twin(
    tmp_path: Path, text: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, twin = fp8_model(tmp_path / "fp8", (48, 40)), tmp_path / "twin"
    twin.mkdir()
    save_file(expected, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_bytes((tmp_path / "fp8" / "config.json").read_bytes())
    set_quantization(twin, None)
    for model in (tmp_path / "fp8", twin):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((tiny_model / name).read_bytes())
    assert main(["plan", str(tmp_path / "fp8"), "--clusters", "4"]) == 0
    assert "left out (a scale of fp8 weights, which are read as bfloat16): 14 tensors" in capsys.readouterr().out
    measured = {}
    for model in (tmp_path / "fp8", twin):
        out = tmp_path / f"{model.name}-out"
        assert main(["compress", str(model), str(out), "--clusters", "4", "--rank", "2", "--local"]) == 0
        assert main(["restore", str(out), f"{out}-dense", "--local"]) == 0
        figures = tmp_path / f"{model.name}.json"
        argv = ["evaluate", str(model), "--text", str(text), "--seqlen", "32", "--windows", "2", "--local"]
        assert main([*argv, "--json", str(figures)]) == 0
        measured[model.name] = json.loads(figures.read_text())["perplexity"]
    assert measured["fp8"] == measured["twin"]
    for form in ("out", "out-dense"):
        found, same = (tensors_of(tmp_path / f"{name}-{form}") for name in ("fp8", "twin"))
        assert found.keys() == same.keys()
        assert all(torch.equal(found[name], same[name]) for name in found)
    config = json.loads((tmp_path / "fp8-out-dense" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8_of_compressed_tensors_is_read_too(tmp_path: Path, strategy: str) -> None:
    size = {"tensor": (96, 96), "channel": (1, 96), "block": (32, 32)}[strategy]
    fp8_model(tmp_path / "fp8", size)
    tensors, expected = load_file(tmp_path / "fp8" / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scales = name.removesuffix("_scale_inv"), tensors.pop(name)
        expected[weight] = meant(tensors[weight], scales, size)
        tensors[f"{weight}_scale"] = scales.reshape(1) if strategy == "tensor" else scales
        tensors[weight.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    weights |= {"block_structure": list(size)} if strategy == "block" else {}
    about = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    set_quantization(tmp_path / "fp8", about)
    source = open_checkpoint(str(tmp_path / "fp8"))
    assert not [name for name in source.tensors if "scale" in name]
    for name, tensor in expected.items():
        assert torch.equal(read_tensor(source.store, source.tensors[name]), tensor), name


def refused(model: Path, capsys: pytest.CaptureFixture[str], verb: str = "plan") -> str:
    capsys.readouterr()
    argv = {"plan": ["plan", str(model)], "evaluate": ["evaluate", str(model), "--text", "none", "--local"]}[verb]
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    return printed


class TestRefusals:
    """One line that names the method, and what to do."""

    def test_scales_that_do_not_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fp8_model(tmp_path, (32, 32))
        set_quantization(tmp_path, {"quant_method": "fp8"})
        assert "do not match model.layers.0.mlp.down_proj.weight" in refused(tmp_path, capsys)
        set_quantization(tmp_path, {"quant_method": "fp8", "weight_block_size": [16, 32]})
        assert "weight_block_size [16, 32]; give the model in bfloat16" in refused(tmp_path, capsys)

    def test_fp8_weights_some_of_which_have_no_scales(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fp8_model(tmp_path, (32, 32))
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
        save_file(tensors, tmp_path / "model.safetensors")
        assert "layers.1.mlp.up_proj.weight is fp8 and has no scales" in refused(tmp_path, capsys)

    @pytest.mark.parametrize(
        ("method", "helps"),
        [
            ("gptq", "transformers cannot dequantize"), ("awq", "transformers cannot dequantize"),
            ("hqq", "transformers cannot dequantize"), ("torchao", "transformers cannot dequantize"),
            ("modelopt", "transformers cannot dequantize"), ("bitsandbytes", "m.dequantize()"),
            ("mxfp4", "Mxfp4Config(dequantize=True)"), ("fp8", "FineGrainedFP8Config(dequantize=True)"),
            ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("verb", ["plan", "evaluate"])
    def test_other_methods(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, helps: str, verb: str
    ) -> None:
        for file in tiny_model.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        set_quantization(tmp_path, {"quant_method": method})
        printed = refused(tmp_path, capsys, verb)
        assert f"already quantized by '{method}'" in printed
        assert "give the unquantized model" in printed
        assert helps in printed

    def test_int4_of_compressed_tensors(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for file in tiny_model.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        set_quantization(tmp_path, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
        assert "quantized by 'compressed-tensors' in the format 'pack-quantized'" in refused(tmp_path, capsys)

    def test_packed_weights_without_a_quantization_config(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_file({"model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        printed = refused(tmp_path, capsys)
        assert "by 'awq' as model.layers.0.self_attn.q_proj.qweight shows" in printed

    @pytest.mark.parametrize(
        ("method", "names"),
        [
            ("'gptq'", {"q_proj.qweight": torch.int32, "q_proj.g_idx": torch.int32}),
            ("'compressed-tensors'", {"q_proj.weight_packed": torch.int32}),
            ("'modelopt (NVFP4)'", {"q_proj.weight": torch.uint8, "q_proj.weight_scale_2": torch.float32}),
            ("'bitsandbytes'", {"q_proj.weight": torch.uint8, "q_proj.weight.absmax": torch.float32}),
            ("'bitsandbytes'", {"q_proj.weight": torch.int8, "q_proj.SCB": torch.float32}),
            ("'hqq'", {"q_proj.W_q": torch.uint8}),
            ("'mxfp4'", {"gate_up_proj_blocks": torch.uint8, "gate_up_proj_scales": torch.uint8}),
            ("'aqlm'", {"q_proj.codebooks": torch.float16, "q_proj.codes": torch.int8}),
            ("a method that config.json does not name",
            {"q_proj.weight": torch.int8, "q_proj.weight_scale": torch.float32}),
            ("'mxfp8'", {"q_proj.weight": torch.float8_e4m3fn, "q_proj.weight_scale": torch.uint8}),
        ],
    )  # fmt: skip
    def test_methods_that_only_the_names_of_tensors_show(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, names: dict[str, torch.dtype]
    ) -> None:
        tensors = {f"model.layers.0.self_attn.{name}": torch.zeros(4, 8).to(dtype) for name, dtype in names.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert f"already quantized by {method}" in refused(tmp_path, capsys)

    @pytest.mark.parametrize("place", ["compression_config", "text_config"])
    def test_other_places_of_a_config(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
    ) -> None:
        for file in tiny_model.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        about = {"quant_method": "nvfp4"}
        config[place] = about if place == "compression_config" else {"quantization_config": about}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "already quantized by 'nvfp4'" in refused(tmp_path, capsys)
