"""`swsc restore --adapter` writes a dense base and a LoRA adapter that stock transformers and PEFT open."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.engine.ray_backend.worker_pools import LocalPools
from pipeline.engine.stage import Stage
from pipeline.engine.task import JobContext, Pool
from pipeline.errors import CheckpointError
from pipeline.restoring.flow import RestoreOptions, restore_model
from pipeline.restoring.job import ExtractLowRank
from pipeline.settings.cluster import ClusterSettings
from swsc_core import SwscSpec, encode
from swsc_core.compressed.registry import matrix_of
from tests.support.tiny import contents, make_tiny_model

SEGMENTS = ["--clusters", "16", "--segment-size", "4", "--scaled", "--include", "proj"]
FORMS = {
    "paper": ["--bits", "6"],
    "input channels": ["--bits", "6", "--channel-axis", "input", "--include", "proj"],
    "few bits": [*SEGMENTS, "--rank", "3", "--factor-bits", "8", "--centroid-bits", "8"],
    "compensation alone": ["--clusters", "0", "--rank", "5"],
    "with the tied head": ["--clusters", "9", "--rank", "2", "--include", "embed_tokens|q_proj"],
}
# What a user without swsc runs, for one line after the other: the base, the adapter and where to leave the logits.
STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
for line in sys.stdin:
    base, adapter, on_top, merged = json.loads(line)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, on_top)
        torch.save(model.merge_and_unload()(input_ids=ids).logits, merged)
    assert not [name for name in sys.modules if name.startswith(("swsc", "pipeline", "jobs"))]
    print("done", flush=True)
"""
Stock = Callable[[Path], list[torch.Tensor]]


def restore(*arguments: object) -> int:
    return main(["restore", *map(str, arguments), "--local"])


def logits(directory: Path) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(ids).logits


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Logits with the adapter on top, and merged, of a process that knows nothing of this project."""
    place = tmp_path_factory.mktemp("stock")
    command = [sys.executable, "-W", "error::UserWarning", "-c", STOCK]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env={"HF_HUB_OFFLINE": "1"}, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(base: Path) -> list[torch.Tensor]:
            found = [place / "on-top.pt", place / "merged.pt"]
            print(
                json.dumps([str(part) for part in (base, base / "swsc_adapter", *found)]),
                file=process.stdin,
                flush=True,
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n", "its error is on standard error"
            return [torch.load(file) for file in found]

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    assert main(["compress", str(model), str(output), "--local", *FORMS["paper"]]) == 0
    return output


@pytest.mark.parametrize("form", FORMS)
def test_stock_peft_gives_what_the_restored_model_gives(
    model: Path, stock: Stock, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole, base = (tmp_path / name for name in ("out", "whole", "base"))
    assert main(["compress", str(model), str(out), "--local", *FORMS[form]]) == 0
    assert restore(out, whole) == restore(out, base, "--adapter") == 0
    printed = capsys.readouterr().out
    expected, alone = logits(whole), logits(base)
    for found in stock(base):
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (alone - expected).abs().max() > 0.1
    assert ("note: 1 tensors" in printed and "embed_tokens" in printed) == (form == "with the tied head")
    assert main(["verify", str(base), "--local"]) == 0


def test_ranks_differ_by_layer_and_tensors_without_a_rank_are_left_out(
    model: Path, stock: Stock, tmp_path: Path
) -> None:
    """As presets allocate them; here by hand, in a directory that transformers has saved."""
    import swsc_core.hf

    opened: Any = AutoModelForCausalLM.from_pretrained(model)
    ranks = {0: 4, 1: 0, 2: 7}
    for layer, rank in ranks.items():
        linear = opened.model.layers[layer].self_attn.q_proj
        opened.model.layers[layer].self_attn.q_proj = swsc_core.SwscLinear.from_linear(linear, SwscSpec(5, rank))
    opened.config.quantization_config = swsc_core.hf.SwscConfig()
    opened.hf_quantizer = swsc_core.hf.SwscQuantizer(opened.config.quantization_config)
    opened.save_pretrained(tmp_path / "out")
    assert restore(tmp_path / "out", tmp_path / "whole") == 0
    assert restore(tmp_path / "out", tmp_path / "base", "--adapter") == 0
    about = json.loads((tmp_path / "base" / "swsc_adapter" / "adapter_config.json").read_text())
    assert about["target_modules"] == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)]
    assert len(about["rank_pattern"]) == 1
    expected = logits(tmp_path / "whole")
    for found in stock(tmp_path / "base"):
        assert (found - expected).abs().max() <= 1e-5 * float(expected.abs().max())


def test_the_parts_are_exactly_the_stored_ones(compressed: Path, model: Path, tmp_path: Path) -> None:
    assert restore(compressed, tmp_path / "base", "--adapter") == 0
    carried = load_file(tmp_path / "base" / "swsc_adapter" / "adapter_model.safetensors")
    stored = {name: t for file in compressed.glob("*.safetensors") for name, t in load_file(file).items()}
    layer = "model.layers.1.self_attn.k_proj"
    assert torch.equal(carried[f"base_model.model.{layer}.lora_A.weight"], stored[f"{layer}.right"])
    assert torch.equal(carried[f"base_model.model.{layer}.lora_B.weight"].T, stored[f"{layer}.left"])
    base = {n: t for file in (tmp_path / "base").glob("*.safetensors") for n, t in load_file(file).items()}
    assert len(base[f"{layer}.weight"].unique(dim=0)) == len(stored[f"{layer}.weight"])  # as many rows as centroids


@pytest.mark.parametrize(
    "flags", [["--clusters", "9", "--rank", "0"], ["--method", "rtn", "--bits", "4"]], ids=["clusters alone", "rtn"]
)
def test_a_model_without_a_low_rank_part_is_refused(
    model: Path, tmp_path: Path, flags: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(model), str(tmp_path / "out"), "--local", *flags]) == 0
    assert restore(tmp_path / "out", tmp_path / "base", "--adapter") == 2
    assert "--adapter" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_low_rank_parts_that_no_adapter_can_carry_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--clusters", "9", "--rank", "2", "--include", "embed_tokens"]
    assert main(["compress", str(model), str(tmp_path / "out"), "--local", *flags]) == 0
    assert restore(tmp_path / "out", tmp_path / "base", "--adapter") == 2
    assert "model.embed_tokens.weight" in capsys.readouterr().err


def test_fused_experts_are_restored_whole_beside_an_adapter_on_what_is_linear(
    stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    flags = ["--include", r"q_proj|experts\.", "--clusters", "9", "--rank", "3"]
    assert main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), "--local", *flags]) == 0
    assert restore(tmp_path / "out", tmp_path / "whole") == 0
    assert restore(tmp_path / "out", tmp_path / "base", "--adapter") == 0
    assert "the low-rank part of 2 of them" in (printed := capsys.readouterr().out)
    assert f"note: {2 * 4 * 3} tensors" in printed
    expected = logits(tmp_path / "whole")
    for found in stock(tmp_path / "base"):
        assert (found - expected).abs().max() <= 1e-5 * float(expected.abs().max())


def test_an_interrupted_export_goes_on_and_has_the_same_bytes(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert restore(compressed, tmp_path / "straight", "--adapter") == 0

    def low_rank(self: ExtractLowRank, context: JobContext) -> object:
        raise CheckpointError(f"{self.location}: no such directory")

    monkeypatch.setattr(ExtractLowRank, "run", low_rank)
    assert restore(compressed, tmp_path / "base", "--adapter") == 2
    assert not (tmp_path / "base" / MANIFEST).exists()
    monkeypatch.undo()
    assert restore(compressed, tmp_path / "base", "--adapter") == 0
    for place in ("", "swsc_adapter"):
        assert contents(tmp_path / "base" / place) == contents(tmp_path / "straight" / place)


def test_damage_to_the_adapter_is_named(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore(compressed, tmp_path / "base", "--adapter") == 0
    file = tmp_path / "base" / "swsc_adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert main(["verify", str(tmp_path / "base"), "--local"]) == 1
    assert "swsc_adapter/adapter_model.safetensors: base_model.model" in capsys.readouterr().err


def test_no_adapter_is_left_beside_a_model_that_is_restored_whole(compressed: Path, tmp_path: Path) -> None:
    assert restore(compressed, tmp_path / "dense", "--adapter") == 0
    assert restore(compressed, tmp_path / "dense") == 2
    assert restore(compressed, tmp_path / "dense", "--overwrite") == 0
    assert not (tmp_path / "dense" / "swsc_adapter").exists()


def test_both_parts_of_a_matrix_add_up() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = SwscSpec(6, 4, segment_size=8, scaled=True, factor_bits=6)
    found = encode(weight, [spec])
    matrix = matrix_of(found.tensors, found.entry)
    left, right = matrix.low_rank_part()
    total = matrix.without_low_rank().float() + left.T @ right
    assert left.dtype == torch.float32
    assert torch.allclose(total, found.restored.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("adapter", [False, True])
def test_workers_that_stand_elsewhere_find_a_model_that_was_named_from_here(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    """A worker of a cluster that runs already has that cluster's directory, not ours."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(compressed.parent)

    class Elsewhere(LocalPools):
        def __call__(self, tasks: int, stage: Stage) -> Pool:
            monkeypatch.chdir(tmp_path / "elsewhere")
            return super().__call__(tasks, stage)

    there = Elsewhere(ClusterSettings(local=True))
    restore_model(compressed.name, str(tmp_path / "dense"), there, RestoreOptions(adapter=adapter))
    monkeypatch.chdir(tmp_path)
    assert main(["verify", str(tmp_path / "dense"), "--local"]) == 0
