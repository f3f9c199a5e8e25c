"""A node that joins while a run is under way and does not fit it ends the run, and costs nothing that is finished."""

from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.device import require_same_kind
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.task import TaskResult
from tests.support.tiny import contents

FLAGS = ["--local", "--projectors", "q,k", "--clusters", "4", "--rank", "1", "--n-init", "1"]


def refused_after(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on another kind of device starts after a number of tasks."""
    real, count = LocalPool.wait, iter(range(1000))

    def wait(self: LocalPool) -> TaskResult[Any] | None:
        if next(count) == finished:
            require_same_kind("NVIDIA A100", "NVIDIA L4")
        return real(self)

    monkeypatch.setattr(LocalPool, "wait", wait)


def test_finished_files_stay_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_after(2, monkeypatch)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS]) == 2
    assert "NVIDIA L4" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS]) == 0
    assert "2 files were finished" in capsys.readouterr().out
    assert main(["compress", str(tiny_model), str(tmp_path / "straight"), *FLAGS]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_cluster_that_never_did_anything_leaves_no_output(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_after(0, monkeypatch)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS]) == 2
    assert not (tmp_path / "out").exists()
