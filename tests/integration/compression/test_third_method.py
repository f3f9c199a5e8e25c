"""A compression method that exists in this file alone: one class, one registration, and every verb takes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import swsc_core.hf  # noqa: F401  (registers the quantizer)
from jobs.cli import main
from swsc_core import SwscLinear, align
from swsc_core.compressed.compressed_matrix import CompressedMatrix, CompressOptions
from swsc_core.compressed.entry import Entry, PartShape
from swsc_core.compressed.registry import register
from swsc_core.method.spec import Spec
from tests.support.tiny import make_tiny_model


@dataclass(frozen=True)
class CopySpec(Spec):
    """W / max|W| in bfloat16, and the maximum as a scale."""

    method: Literal["copy"] = "copy"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        return 2 * shape[0] * shape[1] + 4

    def paper_bits(self, shape: tuple[int, int]) -> float:
        return 16.0


@dataclass(frozen=True)
class CopyEntry(Entry):
    method: ClassVar[str] = "copy"

    def part_shapes(self) -> dict[str, PartShape]:
        return {"weight": PartShape(self.shape, True), "scales": PartShape((1,), True)}


@dataclass(frozen=True)
class ScaledCopy(CompressedMatrix):
    spec_type = CopySpec
    entry_type = CopyEntry
    part_names = ("weight", "scales")
    entry: CopyEntry
    weight: Tensor
    scale: Tensor

    @classmethod
    def compress(cls, weight: Tensor, spec: CopySpec, options: CompressOptions) -> tuple["ScaledCopy", dict[str, Any]]:
        scale = weight.float().abs().max().reshape(1)
        entry = CopyEntry((weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."))
        return cls(entry, (weight.float() / scale).bfloat16(), scale), {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: CopyEntry) -> "ScaledCopy":
        return cls(entry, tensors["weight"], tensors["scales"])

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scales": self.scale}

    def restore(self) -> Tensor:
        return (self.weight.float() * self.scale.float()).to(self.entry.torch_dtype)


register(ScaledCopy)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    flags = ["--method", "copy", "--include", "proj|embed_tokens", "--local"]
    assert main(["compress", str(model), str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def restored(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("restored") / "out"
    assert main(["restore", str(compressed), str(out), "--local"]) == 0
    return out


def opened(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory)
    align(model)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.float()


def test_entries_and_report_rows_state_the_method(compressed: Path) -> None:
    entries = json.loads((compressed / "config.json").read_text())["quantization_config"]["tensors"]
    assert {entry["method"] for entry in entries.values()} == {"copy"}
    rows = {row["name"]: row for row in json.loads((compressed / "swsc_report.json").read_text())["tensors"]}
    for name, entry in entries.items():
        row = rows[name]
        assert (row["method"], row["paper_bits"]) == ("copy", 16.0)
        assert row["bits_per_weight"] == 8 * CopySpec().stored_bytes(tuple(entry["shape"]), 32) / (
            entry["shape"][0] * entry["shape"][1]
        )
        assert 0 < row["relative_error"] < 1e-4


def test_the_output_verifies_and_a_changed_byte_does_not(compressed: Path) -> None:
    assert main(["verify", str(compressed), "--local"]) == 0
    file = next(compressed.glob("model-*.safetensors"))
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert main(["verify", str(compressed), "--local"]) == 1
    finally:
        file.write_bytes(whole)


def test_the_restored_model_is_close_to_the_original(model: Path, restored: Path) -> None:
    expected = logits(opened(model))
    assert 0 < (logits(opened(restored)) - expected).norm() / expected.norm() < 0.02


def test_the_compressed_model_has_the_perplexity_of_the_restored_one(
    compressed: Path, restored: Path, tmp_path: Path
) -> None:
    text, found = tmp_path / "text.txt", []
    text.write_text("a method of one file " * 200)
    for place in (compressed, restored):
        result = tmp_path / f"{place.parent.name}.json"
        flags = ["--text", str(text), "--seqlen", "32", "--windows", "4", "--json", str(result), "--local"]
        assert main(["evaluate", str(place), *flags]) == 0
        found.append(json.loads(result.read_text())["nll_per_window"])
    assert found[0] == found[1]


def test_transformers_opens_saves_and_dequantizes_it(compressed: Path, restored: Path, tmp_path: Path) -> None:
    found, expected = opened(compressed), logits(opened(restored))
    assert isinstance(found.model.layers[0].self_attn.q_proj, SwscLinear)
    assert (logits(found) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    found.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(opened(tmp_path / "saved")), logits(found))
    assert main(["restore", str(tmp_path / "saved"), str(tmp_path / "dense"), "--local"]) == 0
    assert torch.equal(logits(opened(tmp_path / "dense")), expected)
    found.dequantize()
    assert torch.equal(logits(found), expected)
