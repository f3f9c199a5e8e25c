"""The commands by which a user installs from a clone: README, quickstart and Makefile give the same ones."""

import re
import shlex

import pytest

from tests.support.project import ROOT


def installs(file: str, extra: str) -> list[list[str]]:
    """Arguments of the commands of `file` that install torch by its pinned version, and this package with `extra`."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("$$(", "$(")
    commands = re.findall(r"^(?: {4}|\t)\S*pip install (.*?)(?: {2,}#.*)?$", text, re.MULTILINE)
    matching = [command for command in commands if "grep '^torch==" in command or f".[{extra}]" in command]
    return [[word for word in shlex.split(command) if word != "--quiet"] for command in matching]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_a_page_installs_as_make_demo_does(page: str) -> None:
    commands = installs("Makefile", "demo")
    assert len(commands) == 2
    assert installs(page, "demo") == commands
