"""Standard output and standard error that cost no result: any encoding, closed, cut off by `| head`, or on a full disk."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def lasting() -> Iterator[Callable[[], OSError | None]]:
    """While entered, printing raises nothing.

    Letters that an encoding lacks are printed as escapes. Once a stream cannot be written, what is printed to it is dropped.

    Yields:
        Flushes standard output and says what kept it from being written; None for nothing, or for a reader that had enough.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    output, errors = _Lasting(before[0]), _Lasting(before[1])
    sys.stdout, sys.stderr = output, errors
    try:
        yield output.failure
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream that goes silent when it cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if stream is None else stream
        self._error: OSError | None = None
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self._error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self._error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        """What is still in the stream's buffer, and what the interpreter flushes at its end, has to go somewhere."""
        self._error = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def failure(self) -> OSError | None:
        self.flush()
        return None if self._error is None or self._error.errno == errno.EPIPE else self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed() -> None:
    """Descriptors 0 to 2 that are closed are opened: the next file would take their number, and what libraries print would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
