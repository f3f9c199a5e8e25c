"""Objects in a lost node's memory are recomputed by the stage that distributes tasks, and no byte differs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from pipeline.calibration import flow as calibrate
from pipeline.calibration.job import AddHessians, KeepHessians
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.ray_backend import worker_pools
from pipeline.engine.task import Job, Task, TaskResult
from pipeline.errors import PayloadLost
from pipeline.evaluation.job import MeasureLosses
from pipeline.tuning import steps as tuning_steps
from pipeline.tuning import windows as tuning_windows
from pipeline.tuning.job import KeepState, MeasureDivergence, TuneGradients, TuneStep
from tests.support.tiny import contents, make_text

FLAGS = ["--local", "--calibration-windows", "32", "--calibration-seqlen", "32", "--clusters", "16", "--rank", "2"]
FLAGS += ["--segment-size", "4", "--scaled", "--centroid-bits", "8", "--projectors", "q,k", "--metric", "activations"]


class Forgetful(LocalPool):
    """A plain loop that loses the payloads of the `at`-th task of a kind, and of `more` tasks after it."""

    kind, at, more, met = "", 0, 0, 0

    def wait(self) -> TaskResult[Any] | None:
        task: Task[Any] = self._waiting[-1]
        if task.kind == self.kind and task.payloads:
            Forgetful.met += 1
            if self.at <= self.met <= self.at + self.more:
                self._waiting.pop()
                return TaskResult(task, error=PayloadLost(f"{task.label}: gone"))
        return super().wait()


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_SHARD_TOKENS", 128)
        patch.setattr(tuning_windows, "_STEP_TOKENS", 64)
        patch.setattr(tuning_steps, "_STATE_INTERVAL", 3)
        patch.setattr(worker_pools, "LocalPool", Forgetful)
        yield


def forget(monkeypatch: pytest.MonkeyPatch, job: type[Job[Any]] | None, at: int, more: int = 0) -> None:
    for name, value in {"kind": job.__name__ if job else "", "at": at, "more": more, "met": 0}.items():
        monkeypatch.setattr(Forgetful, name, value)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 2000, seed=77)


def compress(model: Path, output: Path, calibration: Path, *more: str) -> int:
    return main(["compress", str(model), str(output), "--calibration", str(calibration), *FLAGS, *more])


@pytest.fixture(scope="module")
def straight(tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tuned output of a run that loses nothing."""
    output = tmp_path_factory.mktemp("straight") / "out"
    assert compress(tiny_model, output, calibration, "--tune", "1") == 0
    return contents(output)


@pytest.mark.parametrize(
    ("job", "at", "remedy"),
    [
        (AddHessians, 3, "gathered again"),
        (KeepHessians, 2, "gathered again"),
        (TuneGradients, 9, "from step 3"),
        (TuneStep, 5, "from step 3"),
        (KeepState, 1, "from step 0"),
        (MeasureDivergence, 2, "from step 14"),
    ],
)
def test_a_run_recomputes_lost_payloads(
    job: type[Job[Any]], at: int, remedy: str, tiny_model: Path, calibration: Path, straight: dict[str, bytes],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    forget(monkeypatch, job, at)
    assert compress(tiny_model, tmp_path / "out", calibration, "--tune", "1") == 0
    assert re.search(rf"gone; .*{remedy}", capsys.readouterr().err)
    assert contents(tmp_path / "out") == straight


def test_a_sum_that_is_lost_repeatedly_ends_the_run_and_is_named(
    tiny_model: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forget(monkeypatch, AddHessians, 1, more=10**6)
    assert compress(tiny_model, tmp_path / "out", calibration) == 1
    assert "sum of Hessians: gone" in capsys.readouterr().err
    forget(monkeypatch, None, 0)
    assert compress(tiny_model, tmp_path / "out", calibration) == 0


def test_a_sweep_recompresses_lost_matrices_and_keeps_its_measurements(
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
    forget(monkeypatch, MeasureLosses, 3)
    assert sweep("out") == straight
    assert "compressed again" in capsys.readouterr().err
    forget(monkeypatch, MeasureLosses, 1, more=10**6)
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "never"), "--local"]) == 1
