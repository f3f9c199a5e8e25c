"""Commands in this process, with the arguments that most tests give them."""

from pathlib import Path

from jobs.cli import main


def compress(model: Path, output: Path, *flags: str) -> int:
    """Exit code of `swsc compress` without Ray."""
    return main(["compress", str(model), str(output), "--local", *flags])
