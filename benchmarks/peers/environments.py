"""Virtual environments of the tools, created on demand; each tool has its own, because their pinned libraries conflict.

torch is installed first in its pinned version, because a tool's own requirement would select the newest build with
gigabytes of CUDA. The list of installed requirements is written last, so that an interrupted or outdated environment is
created again.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MARK = "installed.txt"


class EnvironmentFailure(Exception):
    """pip could not install an environment."""


def requirements(name: str) -> str:
    """The pinned requirements of environment `name`."""
    return (HERE / f"requirements-{name}.txt").read_text(encoding="utf-8")


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of environment `name` below `folder`, which is created if it is missing or outdated.

    Raises:
        EnvironmentFailure: pip failed.
    """
    environment = folder / name
    python = environment / "bin" / "python"
    mark = environment / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != requirements(name):
        print(f"installing {name} into {environment}", file=sys.stderr)
        shutil.rmtree(environment, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(environment)], name)
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
