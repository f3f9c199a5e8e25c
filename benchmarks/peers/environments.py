"""A virtual environment for each tool, made when it is first wanted: the tools pin libraries against each other.

torch is installed first and alone, by its pinned version: a tool's own requirement would take the newest build, with
gigabytes of CUDA. What was installed is written down last, so that an interrupted or outdated environment is made anew.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MARK = "installed.txt"


class EnvironmentFailure(Exception):
    """pip could not install; one line."""


def requirements(name: str) -> str:
    """The pinned requirements of environment `name`."""
    return (HERE / f"requirements-{name}.txt").read_text(encoding="utf-8")


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of environment `name` below `folder`, which is made if it is not there as it should be.

    Raises:
        EnvironmentFailure: pip failed.
    """
    place = folder / name
    python = place / "bin" / "python"
    mark = place / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != requirements(name):
        print(f"installing {name} into {place}", file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(place)], name)
        torch = next(line for line in requirements(name).splitlines() if line.startswith("torch=="))
        _run([str(python), "-m", "pip", "install", "--quiet", torch], name)
        _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"requirements-{name}.txt")], name)
        mark.write_text(requirements(name), encoding="utf-8")
    return python


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise EnvironmentFailure(f"environment {name}: {reasons[-1]}")
