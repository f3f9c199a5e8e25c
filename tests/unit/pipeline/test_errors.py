"""The error tree: its drawing matches the classes, and every error survives pickling."""

import errno
import pickle
import re

import pytest

from pipeline import errors
from pipeline.errors import DiskFull, SwscError, UnusableOutput, first_line

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SwscError)]


def test_the_drawing_of_the_module_shows_every_class_below_its_base() -> None:
    parents: list[tuple[int, str]] = []
    drawn = {}
    for match in re.finditer(r"^ {4}([ │├└─]*)(\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(match[1])
        parents = [parent for parent in parents if parent[0] < depth]
        drawn[match[2]] = parents[-1][1] if parents else "Exception"
        parents.append((depth, match[2]))
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_keeps_the_sentence_and_the_exit_code(kind: type[SwscError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("w: damaged")))
    assert (type(copy), str(copy), copy.exit_code) == (kind, "w: damaged", kind.exit_code)


def test_an_unusable_output_keeps_problem_and_remedy_separate() -> None:
    copy = pickle.loads(pickle.dumps(UnusableOutput("out: damaged", "remove it")))
    assert (copy.problem, copy.remedy, str(copy)) == ("out: damaged", "remove it", "out: damaged; remove it")


@pytest.mark.parametrize("number", errors.DISK_FULL_ERRNOS)
def test_a_full_disk_names_the_file(number: int) -> None:
    assert str(DiskFull.from_os_error(OSError(number, "no space", "/out/x"))).startswith("/out/x: no space; ")
    assert ("writable" in str(DiskFull.from_os_error(OSError(number, "")))) == (number == errno.EROFS)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\ntwo", "one"),
        ("\n one \n", "one"),
        ("field 'x':\n  is missing\n more", "field 'x': is missing"),
        ("", "KeyError"),
    ],
)
def test_the_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(KeyError() if not message else RuntimeError(message)) == line
