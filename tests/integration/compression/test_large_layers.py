"""Layers of more bytes than a file may have: the same tensors in more files. The limit is a few kB here."""

import json
from pathlib import Path

import pytest
import torch

from jobs.cli import main
from pipeline.engine.local_pool import LocalPool
from pipeline.planning import tasks
from pipeline.restoring import job as restoring_job
from pipeline.restoring import plan as restoring
from pipeline.variants import compress as variant
from tests.support.families import FamilyModel, tensors_of
from tests.support.tiny import contents, make_text

_LIMIT = 4000
SHAPE = ["--clusters", "5", "--rank", "2", "--local"]


def limit_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tasks, restoring):
        monkeypatch.setattr(module, "FILE_BYTES", _LIMIT)


def files_of(directory: Path) -> int:
    return len(list(directory.glob("*.safetensors")))


def entries_of(directory: Path) -> dict[str, object]:
    entries: dict[str, object] = json.loads((directory / "config.json").read_text())["quantization_config"]["tensors"]
    return entries


def require_equal(first: Path, second: Path) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))]


# experts one by one, fused rows, stacks that fuse gate and up, stacks that interleave them
@pytest.mark.parametrize("name", ["deepseek_v3", "phi3", "llama4", "gpt_oss"])
def test_more_files_hold_the_same_tensors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    family = FamilyModel(name, tmp_path / "model")
    flags = ["--projectors", family.roles, *SHAPE]
    for form in ("swsc", "dense"):
        assert main(["compress", str(family.dense), str(tmp_path / form), *flags, "--format", form]) == 0
    assert main(["restore", str(tmp_path / "swsc"), str(tmp_path / "restored"), "--local"]) == 0
    limit_files(monkeypatch)
    for form in ("swsc", "dense"):
        cut = tmp_path / f"{form}-cut"
        assert main(["compress", str(family.dense), str(cut), *flags, "--format", form]) == 0
        assert files_of(cut) > files_of(tmp_path / form)
        require_equal(cut, tmp_path / form)
        assert main(["verify", str(cut), "--local"]) == 0
    assert entries_of(tmp_path / "swsc-cut") == entries_of(tmp_path / "swsc")
    assert main(["restore", str(tmp_path / "swsc-cut"), str(tmp_path / "restored-cut"), "--local"]) == 0
    require_equal(tmp_path / "restored-cut", tmp_path / "restored")


def test_copies_in_a_stage_of_their_own_are_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a compression on GPUs."""
    command = ["compress", str(tiny_model), "--bits", "4", "--local"]
    assert main([*command, str(tmp_path / "together")]) == 0
    assert "copy:" not in capsys.readouterr().err
    monkeypatch.setattr(variant, "_are_copied_separately", lambda *arguments: True)
    assert main([*command, str(tmp_path / "separately")]) == 0
    assert "copy:" in capsys.readouterr().err
    assert contents(tmp_path / "together") == contents(tmp_path / "separately")


def test_tuned_values_are_written_into_more_files(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_text(tmp_path / "text.txt", 1500, seed=77)
    flags = ["--preset", "best", "--bits", "3", "--tune", "1", "--projectors", "q,k,v,o", "--local"]
    flags += ["--calibration", str(text), "--calibration-windows", "6", "--calibration-seqlen", "32"]
    assert main(["compress", str(tiny_model), str(tmp_path / "whole"), *flags]) == 0
    limit_files(monkeypatch)
    flags += ["--cache-dir", str(tmp_path / "other-cache")]
    assert main(["compress", str(tiny_model), str(tmp_path / "cut"), *flags]) == 0
    assert files_of(tmp_path / "cut") > files_of(tmp_path / "whole")
    require_equal(tmp_path / "cut", tmp_path / "whole")


def test_a_run_that_began_with_other_files_is_completed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier release began it, with one file per layer. Its files are written again under their new names."""
    command = ["compress", str(tiny_model), str(tmp_path / "out"), "--bits", "4", "--local"]
    _interrupt_after(2, monkeypatch, command)
    limit_files(monkeypatch)
    assert main(command) == 0
    assert main(["compress", str(tiny_model), str(tmp_path / "straight"), "--bits", "4", "--local"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_restoration_that_began_with_other_files_is_completed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--bits", "4", "--local"]) == 0
    command = ["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]
    _interrupt_after(2, monkeypatch, command)
    limit_files(monkeypatch)
    assert main(command) == 0
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "straight"), "--local"]) == 0
    assert contents(tmp_path / "dense") == contents(tmp_path / "straight")


def _interrupt_after(files: int, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Run a command that fails at each file after the first `files`."""
    whole, ended = LocalPool.wait, []

    def wait(self: LocalPool) -> object:
        ended.append(0)
        if len(ended) > files:
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPool, "wait", wait)
        assert main(command) == 130


def test_a_worker_opens_the_compressed_model_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in every task, which would read the headers of all files for each file."""
    limit_files(monkeypatch)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--bits", "4", "--local"]) == 0
    whole, opened = restoring_job.opened_once, []

    def counted(location: str, device: str) -> object:
        opened.append(location)
        return whole(location, device)

    monkeypatch.setattr(restoring_job, "opened_once", counted)
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    assert len(opened) == 1
