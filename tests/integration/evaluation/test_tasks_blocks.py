"""Tasks of lm-evaluation-harness with a model that does not fit a worker: the numbers of the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.lm_eval_answerer import Answerer
from pipeline.evaluation.lm_eval_job import RequestAnswers, ScoreInBlock
from pipeline.planning.memory import WORKER_BASE
from tests.support.offline_tasks import findings, make_tasks
from tests.support.tiny import make_tiny_model

SCORED = ["tiny_group", "tiny_rolling"]
# Some layers of the model, and the logits of its longest batch.
SMALL = str((WORKER_BASE.cpu + 7_000_000) / 2**30)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "deep", layers=48)


def command(model: Path, tasks: Path, names: list[str], *flags: str) -> list[str]:
    return ["evaluate", str(model), "--tasks", ",".join(names), "--include-path", str(tasks), "--local", *flags]


def numbers(file: Path, argv: list[str]) -> Any:
    assert main([*argv, "--json", str(file)]) == 0
    results = json.loads(file.read_text())["lm_eval"]
    return findings(results), results["config"]["model_dtype"]


def test_log_likelihoods_equal_those_of_the_whole_model(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(model, tasks, SCORED, "--batch-size", "2")
    whole = numbers(tmp_path / "whole.json", argv)
    real, blocks = ScoreInBlock.run, []

    def run(self: ScoreInBlock, context: JobContext) -> JobOutput[RequestAnswers]:
        blocks.append(self.block)
        return real(self, context)

    monkeypatch.setattr(ScoreInBlock, "run", run)
    monkeypatch.setattr(Answerer, "__init__", None)  # no worker loads the whole model
    assert numbers(tmp_path / "blocks.json", [*argv, "--memory-per-worker", SMALL]) == whole
    assert len({*blocks}) > 1


def test_tasks_that_generate_are_refused_by_name_before_anything_is_measured(
    model: Path, tasks: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--memory-per-worker", SMALL, "--text", str(text), "--json", str(tmp_path / "r.json")]
    assert main(command(model, tasks, ["tiny_rolling", "tiny_write"], *flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "tasks tiny_write: they generate texts, which needs the whole model in a worker" in error[0]
    assert "raise --memory-per-worker" in error[0]
    assert not (tmp_path / "r.json").exists()
