"""Help and mistakes of the command line show at once: no library that takes seconds is imported for them."""

import json
import subprocess
import sys

import pytest

from jobs.command_line.verbs import VERBS

HEAVY = {"torch", "transformers", "ray", "pyarrow", "huggingface_hub", "datasets", "safetensors"}
_RUN = """
import json, sys
from jobs.cli import main
codes = []
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps([codes, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(*calls: list[str]) -> tuple[list[int], set[str]]:
    """Exit codes of commands that end in the parser, and the packages that the process imported for them."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(calls)], capture_output=True, text=True, check=True, timeout=60
    )
    codes, packages = json.loads(done.stdout.splitlines()[-1])
    return codes, set(packages)


def test_help_of_no_verb_imports_what_takes_seconds() -> None:
    codes, packages = imported(["--help"], *([verb, "--help"] for verb in VERBS))
    assert codes == [0] * (1 + len(VERBS))
    assert not packages & HEAVY


def test_the_list_of_verbs_needs_no_settings() -> None:
    codes, packages = imported(["--help"], ["--version"])
    assert codes == [0, 0]
    assert not packages & {*HEAVY, "pydantic", "yaml", "rich", "shtab"}


@pytest.mark.parametrize("argv", [["compress"], ["plan", "m", "--nothing"], ["press"], []])
def test_nor_do_mistakes_of_a_command_line(argv: list[str]) -> None:
    codes, packages = imported(argv)
    assert codes == [2]
    assert not packages & HEAVY
