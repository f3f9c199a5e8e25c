"""Scripts that tests and benchmarks keep in strings, which mypy does not read, import names that exist."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.project import ROOT

FILES = [path.relative_to(ROOT) for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
IMPORT = re.compile(r"^from ((?:benchmarks|jobs|pipeline|swsc_core|tests)[\w.]*) import (.+)$", re.MULTILINE)


def imports_of(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import of this project's packages within a string of several lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            for module, names in IMPORT.findall(node.value):
                yield from ((module, name.split(" as ")[0].strip()) for name in names.split(","))


SCRIPTS = {file: list(imports_of((ROOT / file).read_text(encoding="utf-8"))) for file in FILES}


@pytest.mark.parametrize("file", [file for file, imports in SCRIPTS.items() if imports], ids=Path.as_posix)
def test_scripts_import_names_that_exist(file: Path) -> None:
    for module, name in SCRIPTS[file]:
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}"), (
            f"{module} has no {name}"
        )
