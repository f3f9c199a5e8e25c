"""Lines for the person at the terminal, on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def log_prefix(subject: str) -> Iterator[None]:
    """Start every line that is logged in this context with `subject`."""
    token = _prefix.set(f"{subject}: ")
    try:
        yield
    finally:
        _prefix.reset(token)


def prefixed(line: str) -> str:
    """Return the line with the prefix of the current context."""
    return f"{_prefix.get()}{line}"


def log(line: str) -> None:
    """Print one line to standard error and flush it."""
    print(prefixed(line), file=sys.stderr, flush=True)
