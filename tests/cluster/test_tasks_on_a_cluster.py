"""Tasks of lm-eval are answered by any number of workers, killed ones among them, as by one process."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from tests.support.offline_tasks import TASKS, findings, make_tasks
from tests.support.ray_cluster import ROOT, Cluster, workers_at

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
    return ["--tasks", ",".join(TASKS), "--include-path", str(folder), "--batch-size", "2"]


@pytest.fixture(scope="module")
def compact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compact") / "out"
    assert main(["compress", str(tiny_model), str(path), "--local"]) == 0
    return path


@pytest.fixture(scope="module")
def alone(compact: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    path = tmp_path_factory.mktemp("alone") / "r.json"
    assert main(["evaluate", str(compact), *flags, "--local", "--json", str(path)]) == 0
    return found(path)


def found(path: Path) -> dict[str, Any]:
    return findings(json.loads(path.read_text())["lm_eval"])


def test_what_three_workers_find_is_bit_identical(
    cluster: Cluster, compact: Path, flags: list[str], alone: dict[str, Any], tmp_path: Path
) -> None:
    done = cluster.swsc("evaluate", compact, *flags, "--json", tmp_path / "r.json", "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path / "r.json") == alone


def test_a_killed_worker_is_replaced_and_nothing_differs(
    cluster: Cluster, compact: Path, flags: list[str], alone: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "jobs", "evaluate", str(compact), *flags, "--json", str(tmp_path / "r.json")]
    command += ["--address", cluster.address, "--workers", "2"]
    run = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stderr=subprocess.PIPE, text=True)
    while not (busy := workers_at("AnswerRequests")) and run.poll() is None:
        time.sleep(0.05)
    busy[0].kill()
    _, error = run.communicate(timeout=240)
    assert run.returncode == 0, error
    assert "starting it again" in error
    assert found(tmp_path / "r.json") == alone
