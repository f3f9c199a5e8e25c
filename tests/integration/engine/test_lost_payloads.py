"""Objects in a lost node's memory are recomputed by the stage that distributes tasks, and no byte differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from pipeline.calibration import flow as calibrate
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.ray_backend import worker_pools
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import PayloadLost
from pipeline.tuning import steps as tuning_steps
from pipeline.tuning import windows as tuning_windows
from tests.support.tiny import contents, make_text

FLAGS = ["--local", "--calibration-windows", "32", "--calibration-seqlen", "32", "--clusters", "16", "--rank", "2"]
FLAGS += ["--segment-size", "4", "--scaled", "--centroid-bits", "8", "--projectors", "q,k", "--metric", "activations"]


class Forgetful(LocalPool):
    """A plain loop that has lost what a task was to be given: the `at`-th such task of a kind, and `more` after it."""

    kind, at, more, met = "", 0, 0, 0

    def wait(self) -> TaskResult[Any] | None:
        task: Task[Any] = self._waiting[-1]
        if task.kind == self.kind and task.payloads:
            Forgetful.met += 1
            if self.at <= self.met <= self.at + self.more:
                self._waiting.pop()
                return TaskResult(task, error=PayloadLost(f"{task.label}: gone"))
        return super().wait()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SHARD_TOKENS", 128)
    monkeypatch.setattr(tuning_windows, "_STEP_TOKENS", 64)
    monkeypatch.setattr(tuning_steps, "_KEPT_EVERY", 3)
    monkeypatch.setattr(worker_pools, "LocalPool", Forgetful)
    monkeypatch.setattr(Forgetful, "met", 0)


def forget(monkeypatch: pytest.MonkeyPatch, kind: str, at: int, more: int = 0) -> None:
    for name, value in {"kind": kind, "at": at, "more": more, "met": 0}.items():
        monkeypatch.setattr(Forgetful, name, value)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 2000, seed=77)


def compress(model: Path, output: Path, calibration: Path, *more: str) -> int:
    return main(["compress", str(model), str(output), "--calibration", str(calibration), *FLAGS, *more])


@pytest.mark.parametrize(
    ("kind", "at", "remedy"),
    [
        ("AddHessians", 3, "layers that are not finished are gathered again"),
        ("ExtractHessian", 2, "layers that are not finished are gathered again"),
        ("TuneGradients", 9, "resuming from step 3"),
        ("TuneStep", 5, "resuming from step 3"),
        ("KeepState", 1, "resuming from step 0"),
        ("MeasureDivergence", 2, "resuming from step 14"),
    ],
)
def test_a_run_makes_again_what_was_lost(
    kind: str, at: int, remedy: str, tiny_model: Path, calibration: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert (
        compress(tiny_model, tmp_path / "straight", calibration, "--tune", "1", "--cache-dir", str(tmp_path / "a")) == 0
    )
    forget(monkeypatch, kind, at)
    capsys.readouterr()
    assert compress(tiny_model, tmp_path / "out", calibration, "--tune", "1", "--cache-dir", str(tmp_path / "b")) == 0
    assert f"gone; {remedy}" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_sum_that_is_lost_again_and_again_ends_the_run_and_is_named(
    tiny_model: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forget(monkeypatch, "AddHessians", 1, more=10**6)
    assert compress(tiny_model, tmp_path / "out", calibration) == 1
    assert "sum of Hessians: gone" in capsys.readouterr().err
    forget(monkeypatch, "", 0)
    assert compress(tiny_model, tmp_path / "out", calibration) == 0


def test_a_sweep_compresses_again_what_was_lost_and_keeps_what_was_measured(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [{"name": name, "projectors": name, "bits": 4} for name in ("q", "q,k")]
    evaluations = [{"text": str(text), "seqlen": 32, "windows": 6, "batch_size": 1}]
    settings = {"models": [str(tiny_model)], "variants": variants, "evaluations": evaluations, "uncompressed": False}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings))

    def sweep(name: str) -> list[tuple[str, float]]:
        code = main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / name), "--local"])
        assert code == 0
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        return [(row["variant"], row["perplexity"]) for row in rows]

    straight = sweep("straight")
    forget(monkeypatch, "MeasureLosses", 3)
    assert sweep("out") == straight
    assert "the matrices of q are compressed again" in capsys.readouterr().err
    forget(monkeypatch, "MeasureLosses", 1, more=10**6)
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "never"), "--local"]) == 1
