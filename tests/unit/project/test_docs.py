"""README.md and docs/: links resolve, named files exist, and the prose keeps to the glossary."""

import re
from pathlib import Path

import pytest

from tests.support.glossary import GLOSSARY, pattern_of
from tests.support.project import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

GLOSSARY_WORDS = pattern_of(GLOSSARY)
PAGE_OF_FLAGS = ROOT / "docs" / "cli.md"
PAGES_WITH_OTHER_FLAGS = ("docs/experiments.md", "docs/vllm.md", "benchmarks/README.md")  # those of other tools, too


def _prose(text: str) -> str:
    """The text without code blocks, inline code and link targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4}(?! *[-*] ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"\s+", " ", text)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub derives from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_prose_uses_no_word_that_the_glossary_replaces(page: Path) -> None:
    prose = _prose(page.read_text(encoding="utf-8"))
    assert [prose[max(0, match.start() - 40) : match.end() + 20] for match in GLOSSARY_WORDS.finditer(prose)] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_to_files_and_headings_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in _anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = "swsc_core|pipeline|jobs|tests|configs|examples|benchmarks|deploy|docs|autoload"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_names_that_a_page_places_in_a_file_are_in_it(page: Path) -> None:
    placed = re.findall(r"`(\w+)` (?:in|of) `([\w/-]+\.py)`", page.read_text(encoding="utf-8"))
    assert [name for name, file in placed if name not in (ROOT / file).read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", [page for page in PAGES if _name(page) not in PAGES_WITH_OTHER_FLAGS], ids=_name)
def test_flags_that_a_page_shows_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}swsc .*(?:\\\n.*)*", text, re.MULTILINE) + re.findall(r"`((?:swsc |--)[^`]*)`", text)
    shown = {flag for command in commands for flag in re.findall(r"--[a-z][a-z-]*", command.partition(" #")[0])}
    assert shown - set(re.findall(r"--[a-z][a-z-]*", PAGE_OF_FLAGS.read_text(encoding="utf-8"))) == set()
