"""Commands with a Ray of their own: beside each other, and interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import two_commands
from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from tests.support.ray_cluster import ROOT
from tests.support.tiny import contents

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
FLAGS = ["--projectors", "q,k,down", "--bits", "4"]


def test_two_commands_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    alone, found = two_commands.measure(tmp_path, rounds=2, words=1_200_000)
    assert alone.code == 0
    for _, run, first_is_alive in found:
        assert run.code == 0
        assert first_is_alive
        assert run.first_line < alone.first_line + 30  # 15 on a quiet machine: the benchmark holds to that


def compress(model: Path, output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs", "compress", str(model), str(output), *FLAGS, "--address", "local"]
    command += ["--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_signal_at_any_time_is_not_lost_and_leaves_no_process_behind(tiny_model: Path, tmp_path: Path) -> None:
    """Also while Ray is started, which takes seconds, and whatever comes of it the same command completes the output.

    With the bytes of the plain loop: those of two one-thread workers on a node that was started in the process itself.
    """
    random.seed(19)
    started = time.monotonic()
    with compress(tiny_model, tmp_path / "straight") as process:
        assert process.wait() == 0
    whole, codes = time.monotonic() - started, []
    for number in range(4):
        with compress(tiny_model, tmp_path / "out") as process:
            time.sleep(0.5 + (whole - 0.5) * (number + random.random()) / 4)
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            sent = random.choice([signal.SIGINT, signal.SIGTERM])
            process.send_signal(sent)
            errors = process.communicate()[1]
        codes.append(process.returncode)
        is_whole = (tmp_path / "out" / MANIFEST).exists()  # then Python may have been ending already, without handlers
        assert process.returncode == 130 or (is_whole and process.returncode in (0, -sent)), errors
        assert "Traceback" not in errors
        assert psutil.wait_procs(family, timeout=20)[1] == []
    assert 130 in codes
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", *FLAGS]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_workers_do_not_import_from_a_working_directory_with_packages_of_our_names(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise ImportError('of the working directory')")
    command = [sys.executable, str(ROOT / "swsc_command.py"), "compress", str(tiny_model), "out", *FLAGS]
    done = subprocess.run(
        [*command, "--address", "local", "--workers", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / MANIFEST).exists()


SLOW_START = """
import os, signal, time
import ray
from pipeline.engine.ray_backend import connection
from pipeline.engine import signals

start = ray.init


def slow(**settings):
    start(**settings)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # longer than the alarm


ray.init = slow
with signals.handle_signals():
    try:
        connection.connect("local")
    except KeyboardInterrupt:
        print("arrived")
"""


def test_ray_does_not_abort_a_run_that_takes_seconds_to_end(tmp_path: Path) -> None:
    """Ray's part in C++ hears a signal that comes while it starts, and sets an alarm of 3 s that aborts the process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SLOW_START], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["arrived"]), done.stderr
