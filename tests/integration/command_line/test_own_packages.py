"""A user's own folder named like one of this tool's packages.

It hides nothing, or the command names it in one error line.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.ray_backend import connection
from pipeline.errors import ClusterError
from tests.support.project import ROOT

COMMAND = "from swsc_command import main; raise SystemExit(main())"


def swsc(folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """The command with `folder` first on Python's path, as `ray job submit --working-dir` has it."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *argv], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("package", ["jobs/__init__.py", "pipeline/__init__.py", "swsc_core/__init__.py", "jobs.py"])
def test_a_package_that_hides_one_of_ours_is_named(tmp_path: Path, package: str) -> None:
    (tmp_path / package).parent.mkdir(exist_ok=True)
    (tmp_path / package).touch()
    done = swsc(tmp_path, "--help")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "monday.txt").touch()
    done = swsc(tmp_path, "--help")
    assert done.returncode == 0, done.stderr


def test_a_working_directory_that_was_removed_is_an_error_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ClusterError):
        connection.connect("local")
