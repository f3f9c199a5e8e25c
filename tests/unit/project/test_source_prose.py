"""Comments, docstrings, messages and identifiers of the source keep to the glossary."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.glossary import DIALECT, GLOSSARY, pattern_of
from tests.support.project import ROOT

FOLDERS = ("autoload", "benchmarks", "examples", "jobs", "pipeline", "swsc_core", "tests")
TABLES = ("glossary.py", "test_source_prose.py")  # they name the avoided words
FILES = [
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name not in TABLES
]
PATTERN = pattern_of(GLOSSARY, DIALECT)
SYNTAX = {"slots", "__slots__", "tell"}  # of Python


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, each identifier and each string of several words.

    A string without a space is a key, a path or a value of a format that is documented elsewhere.
    """
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # From Python 3.12 on, an f-string is several tokens.
        if token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)):
            if " " in token.string:
                yield token.start[0], token.string
        elif token.type == tokenize.COMMENT or (token.type == tokenize.NAME and token.string not in SYNTAX):
            yield token.start[0], token.string


def hits_of(source: str) -> list[str]:
    """Line and surroundings of each avoided word."""
    return [
        f"line {line + text.count(chr(10), 0, match.start())}: {text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for line, text in texts_of(source)
        for match in PATTERN.finditer(text)
    ]


@pytest.mark.parametrize("file", FILES, ids=Path.as_posix)
def test_the_source_uses_no_word_that_the_glossary_replaces(file: Path) -> None:
    assert hits_of((ROOT / file).read_text(encoding="utf-8")) == []


def test_words_are_found_in_comments_docstrings_messages_and_names_but_not_in_keys() -> None:
    source = '"""What it lies."""\n# told\nfoo_said = {"moments": f"it says {foo} no"}\n'
    ast.parse(source)
    assert [hit.split(":")[0] for hit in hits_of(source)] == ["line 1", "line 2", "line 3", "line 3"]
    assert hits_of('class A:\n    __slots__ = ()\n\nsecond_moment = {"joined": " ".join([])}  # fused\n') == []
