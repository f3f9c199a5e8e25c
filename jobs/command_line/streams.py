"""Standard output and standard error that never raise: any encoding, closed, a reader that stops early, a full disk."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def safe_streams() -> Iterator[Callable[[], OSError | None]]:
    """While entered, printing raises nothing.

    Characters that the encoding lacks are printed as escapes. Text for a stream that cannot be written is dropped.

    Yields:
        A function that flushes standard output and returns the error that prevented writing. It returns None if there
        was none, or if the reader closed the pipe.
    """
    _open_closed_descriptors()
    streams = sys.stdout, sys.stderr
    output, errors = _SafeStream(streams[0]), _SafeStream(streams[1])
    sys.stdout, sys.stderr = output, errors
    try:
        yield output.failure
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = streams


class _SafeStream:
    """A text stream that drops text once it cannot be written."""

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
                self._redirect(error)
        return len(text)

    def flush(self) -> None:
        if self._error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._redirect(error)

    def _redirect(self, error: OSError) -> None:
        """Send the stream's buffer, which the interpreter flushes when it exits, to the null device."""
        self._error = error
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def failure(self) -> OSError | None:
        """The error that prevented writing; None for a reader that closed the pipe."""
        self.flush()
        return None if self._error is None or self._error.errno == errno.EPIPE else self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_descriptors() -> None:
    """Open descriptors 0 to 2 if they are closed: a file with such a number would receive what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
