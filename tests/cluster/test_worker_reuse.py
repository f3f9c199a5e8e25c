"""A command starts its workers once, and every stage of it runs on them."""

import sys
from pathlib import Path

import pytest

from tests.support.ray_cluster import ray_cluster
from tests.support.tiny import make_text, make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = """
import sys
from jobs.cli import main
from pipeline.engine.ray_backend.workers import RayWorkers

started, spawn = [], RayWorkers._spawn
RayWorkers._spawn = lambda self, worker: (started.append(worker), spawn(self, worker))
code = main(sys.argv[1:])
print("swsc:", code, *started)
"""


def test_all_stages_of_a_compression_run_on_the_same_workers(tmp_path: Path) -> None:
    model, text = make_tiny_model(tmp_path / "model"), make_text(tmp_path / "text.txt", 2000)
    calibration = make_text(tmp_path / "calibration.txt", 2000, seed=5)
    flags = ["--preset", "best", "--bits", "4", "--projectors", "q", "--tune", "1", "--calibration", str(calibration)]
    flags += ["--calibration-windows", "4", "--calibration-seqlen", "32"]
    flags += ["--text", str(text), "--seqlen", "32", "--windows", "4", "--workers", "2"]
    with ray_cluster("--num-cpus=2") as cluster:
        command = ["compress", str(model), str(tmp_path / "out"), "--address", cluster.address, *flags]
        done = cluster.run(sys.executable, "-c", SCRIPT, *command)
    assert done.returncode == 0, done.stderr
    assert "swsc: 0 0 1" in done.stdout.splitlines(), done.stderr
