"""Rules of docs/architecture.md about the size of functions and files, checked on the code."""

import ast
from pathlib import Path

import pytest

from tests.support.project import ROOT

PACKAGES = ("swsc_core", "pipeline", "jobs", "benchmarks")
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
# vLLM and SGLang call this method with their own signature.
FOREIGN_SIGNATURES = {"create_weights"}


def functions_of(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """All parameters, keyword-only and collecting ones included, without `self` and `cls`."""
    arguments = function.args
    collecting = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *collecting)]
    return [name for name in names if name not in {"self", "cls"}]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_function_has_more_than_six_parameters(file: Path) -> None:
    functions = [function for function in functions_of(file) if function.name not in FOREIGN_SIGNATURES]
    assert [function.name for function in functions if len(parameters_of(function)) > 6] == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_function_has_more_than_fifty_lines_and_no_file_more_than_three_hundred(file: Path) -> None:
    long = [one.name for one in functions_of(file) if one.end_lineno and one.end_lineno - one.lineno >= 50]
    assert long == []
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 300
