"""Compressing and restoring whole directories, in the plain loop."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.engine import local_pool, stage
from pipeline.models.stored_model import open_model
from pipeline.storage.lease import Ticket
from swsc_core import SwscSpec, encode
from tests.support.tiny import contents, make_tiny_model


def compress(model: Path, output: Path, *flags: str) -> dict[str, Any]:
    assert main(["compress", str(model), str(output), "--local", *flags]) == 0
    return json.loads((output / "swsc_report.json").read_text())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def compressed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "compressed"
    compress(tiny_model, output, "--bits", "4")
    return output


def test_every_tensor_of_the_source_has_an_action_and_a_reason(tiny_model: Path, compressed: Path) -> None:
    report = json.loads((compressed / "swsc_report.json").read_text())
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows.keys() == open_checkpoint(str(tiny_model)).tensors.keys() | {"lm_head.weight"}
    assert all(row["reason"] for row in rows.values())
    assert rows["lm_head.weight"]["action"] == "tied"
    actions = {name: row["action"] for name, row in rows.items() if row["action"] == "compressed"}
    assert len(actions) == 6
    assert all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in actions)


def test_bits_are_counted_from_the_bytes_in_the_files(tiny_model: Path, compressed: Path) -> None:
    report = json.loads((compressed / "swsc_report.json").read_text())
    source = open_checkpoint(str(tiny_model))
    stored = tensors_of(compressed)
    whole = 8 * sum(t.numel() * t.element_size() for t in stored.values()) / source.weights
    assert report["whole_model_bits_per_weight"] == pytest.approx(whole, rel=1e-12)
    for row in (row for row in report["tensors"] if row["action"] == "compressed"):
        stem = row["name"].removesuffix("weight")
        parts = [t for name, t in stored.items() if name.startswith(stem)]
        assert len(parts) == 4
        bits = 8 * sum(t.numel() * t.element_size() for t in parts) / math.prod(row["shape"])
        assert row["bits_per_weight"] == pytest.approx(bits, rel=1e-12)
        assert bits <= 4


def test_streaming_equals_in_memory(tiny_model: Path, tmp_path: Path) -> None:
    """The directory holds what `encode` makes of each tensor, and the other tensors as they were."""
    compress(tiny_model, tmp_path / "out", "--clusters", "5", "--rank", "3", "--seed", "7", "--format", "dense")
    written, source = tensors_of(tmp_path / "out"), open_checkpoint(str(tiny_model))
    for name, info in source.tensors.items():
        weight = read_tensor(source.store, info)
        if "q_proj" in name or "k_proj" in name:
            weight = encode(weight, [SwscSpec(5, 3)], name=name, seed=7).restored
        assert torch.equal(written[name], weight), name


def test_restored_and_dense_formats_hold_the_same_and_stock_transformers_opens_both(
    tiny_model: Path, compressed: Path, tmp_path: Path
) -> None:
    compress(tiny_model, tmp_path / "dense", "--bits", "4", "--format", "dense")
    assert main(["restore", str(compressed), str(tmp_path / "restored"), "--local"]) == 0
    one, other = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "restored")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    ids = torch.arange(12)[None]
    logits = []
    for name in ("dense", "restored"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        model, info = loaded
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # still tied
        logits.append(model(ids).logits)
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("w1 w2").input_ids


def test_restore_of_a_dense_model_is_a_mistake(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", str(tiny_model), str(tmp_path / "out"), "--local"]) == 2
    assert "nothing to restore" in capsys.readouterr().err


def test_stock_transformers_refuses_the_compact_form_loudly(compressed: Path) -> None:
    """Without the plug-in a load must fail; it must never run on random weights."""
    load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(compressed)!r})"
    ended = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "mismatch" in ended.stderr


@pytest.mark.parametrize("method", [["--method", "rtn", "--bits", "3"], ["--channel-axis", "auto", "--bits", "3"]])
def test_compact_and_dense_form_agree_for_every_method(tiny_model: Path, tmp_path: Path, method: list[str]) -> None:
    compress(tiny_model, tmp_path / "compact", *method, "--projectors", "q,k,v,o,gate,up,down")
    compress(tiny_model, tmp_path / "dense", *method, "--projectors", "q,k,v,o,gate,up,down", "--format", "dense")
    model, dense = open_model(str(tmp_path / "compact")), tensors_of(tmp_path / "dense")
    assert sorted(model.names) == sorted(dense)
    assert len(model.entries) == 21
    assert all(torch.equal(model.read(name), dense[name]) for name in dense)


def test_single_file_and_sharded_sources_give_the_same_tensors(tmp_path: Path) -> None:
    for name, shards in (("one", False), ("many", True)):
        make_tiny_model(tmp_path / name, shards=shards, tied=False)
        compress(tmp_path / name, tmp_path / f"{name}-out", "--bits", "4")
    one, many = tensors_of(tmp_path / "one-out"), tensors_of(tmp_path / "many-out")
    assert one.keys() == many.keys()
    assert "lm_head.weight" in one
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_selection_by_expression(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--include", r"layers\.[01]\..*(q_proj|norm)", "--exclude", r"layers\.1\.", "--bits", "4")
    rows = {row["name"]: row for row in compress(tiny_model, tmp_path / "out", *flags)["tensors"]}
    done = [name for name, row in rows.items() if row["action"] == "compressed"]
    assert done == ["model.layers.0.self_attn.q_proj.weight"]
    assert "not a matrix" in rows["model.layers.0.input_layernorm.weight"]["reason"]
    assert "--exclude" in rows["model.layers.1.self_attn.q_proj.weight"]["reason"]


class TestInterruption:
    """An interrupted run resumes; its files never count as a model."""

    def interrupted(self, tiny_model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        written = 0
        real = os.replace

        def replace(source: Path, target: Path) -> None:
            nonlocal written
            if Path(target).suffix == ".safetensors":
                if written == after:
                    raise KeyboardInterrupt
                written += 1
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        assert main(["compress", str(tiny_model), str(output), "--local"]) == 130
        monkeypatch.undo()

    def ends_as_if_nothing_had_happened(self, tiny_model: Path, tmp_path: Path) -> None:
        compress(tiny_model, tmp_path / "out")
        compress(tiny_model, tmp_path / "straight")
        assert contents(tmp_path / "out") == contents(tmp_path / "straight")

    def test_it_goes_on_and_ends_as_if_nothing_had_happened(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupted(tiny_model, tmp_path / "out", monkeypatch, after=2)
        assert not (tmp_path / "out" / "config.json").exists()
        calls: list[str] = []
        monkeypatch.setattr(stage, "execute", _counting(stage.execute, calls))
        compress(tiny_model, tmp_path / "out")
        assert calls.count("CompressLayer") == 1  # of three layers
        self.ends_as_if_nothing_had_happened(tiny_model, tmp_path)

    def test_a_damaged_finished_file_is_made_again(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupted(tiny_model, tmp_path / "out", monkeypatch, after=2)
        victim = next((tmp_path / "out").glob("*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
        self.ends_as_if_nothing_had_happened(tiny_model, tmp_path)

    def test_other_settings_are_refused_and_nothing_is_lost(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.interrupted(tiny_model, tmp_path / "out", monkeypatch, after=2)
        before = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", "--seed", "3"]) == 2
        assert "seed 0 -> 3" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before

    def test_disk_space_is_required_only_for_unfinished_files(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupted(tiny_model, tmp_path / "out", monkeypatch, after=3)
        done = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 218_000 - done))
        compress(tiny_model, tmp_path / "out")

    def test_a_full_disk_at_the_very_end_keeps_what_is_finished(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        real = os.replace

        def replace(source: Path, target: Path) -> None:
            if Path(target).name == "config.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local"]) == 1
        assert "No space left on device" in capsys.readouterr().err
        monkeypatch.undo()
        self.ends_as_if_nothing_had_happened(tiny_model, tmp_path)

    def test_what_it_left_is_not_opened_as_a_model(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.interrupted(tiny_model, tmp_path / "out", monkeypatch, after=1)
        assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 2
        assert "the output is not finished; run the command that started it again" in capsys.readouterr().err

    def test_one_cut_off_in_its_very_first_write_goes_on(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "out" / ".swsc").mkdir(parents=True)
        (tmp_path / "out" / ".swsc" / "run.json.12345678.partial").write_text("{")
        compress(tiny_model, tmp_path / "out")
        assert not (tmp_path / "out" / ".swsc").exists()

    def test_one_cut_off_right_after_its_manifest_is_complete_and_tidied(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        compress(tiny_model, tmp_path / "out")
        before = contents(tmp_path / "out")
        (tmp_path / "out" / ".swsc").mkdir()
        (tmp_path / "out" / ".swsc" / "run.json").write_text("{}")
        assert main(["evaluate", str(tmp_path / "out"), "--text", "none", "--local"]) == 2  # the text, not the model
        compress(tiny_model, tmp_path / "out")
        assert contents(tmp_path / "out") == before
        assert not (tmp_path / "out" / ".swsc").exists()

    def test_a_node_that_does_not_see_the_output_costs_no_finished_layer(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls = 0

        def blind_at_the_second(ticket: Ticket, file: str, payload: Any) -> Any:
            nonlocal calls
            calls += 1
            elsewhere = replace(ticket, store=ticket.store.below("elsewhere"))
            return real(elsewhere if calls == 2 else ticket, file, payload)

        real = local_pool.commit
        monkeypatch.setattr(local_pool, "commit", blind_at_the_second)
        assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local"]) == 1
        assert "cannot see the lease" in capsys.readouterr().err
        assert len(list((tmp_path / "out" / ".swsc" / "done").iterdir())) >= 2
        monkeypatch.undo()
        assert compress(tiny_model, tmp_path / "out")["files_of_an_earlier_run"] >= 2

    def test_a_source_whose_weights_changed_is_another_source(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_tiny_model(tmp_path / "fine-tuned", seed=1)  # the same shapes and config
        compress(tiny_model, tmp_path / "out")
        assert main(["compress", str(tmp_path / "fine-tuned"), str(tmp_path / "out"), "--local"]) == 2
        assert "source" in capsys.readouterr().err

    def test_a_finished_output_that_lost_a_file_is_not_taken_for_whole(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        compress(tiny_model, tmp_path / "out")
        next((tmp_path / "out").glob("*.safetensors")).unlink()
        assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local"]) == 2
        error = capsys.readouterr().err
        assert "is missing" in error
        assert "--overwrite" in error

    def test_a_finished_output_is_left_alone(self, tiny_model: Path, compressed: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in compressed.iterdir()}
        compress(tiny_model, compressed, "--bits", "4")
        assert {path: path.stat().st_mtime_ns for path in compressed.iterdir()} == before


def _counting(execute: Any, calls: list[str]) -> Any:
    def counted(pool: Any, source: Any, progress: Any) -> None:
        calls.extend(task.kind for task in source._tasks)
        execute(pool, source, progress)

    return counted


@pytest.mark.parametrize("flags", [["--bits", "4"], ["--method", "rtn", "--bits", "3", "--granularity", "group"]])
def test_the_plan_predicts_the_stored_bytes(tiny_model: Path, tmp_path: Path, flags: list[str]) -> None:
    assert main(["plan", str(tiny_model), *flags, "--json", str(tmp_path / "plan.json")]) == 0
    predicted = json.loads((tmp_path / "plan.json").read_text())
    report = compress(tiny_model, tmp_path / "out", *flags)
    for key in ("compressed_bits_per_weight", "whole_model_bits_per_weight", "share_of_weights_compressed"):
        assert predicted[key] == report[key]
    stored = sum(t.numel() * t.element_size() for t in tensors_of(tmp_path / "out").values())
    assert predicted["output_bytes"] == stored
