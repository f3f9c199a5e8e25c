"""How far a run has come: a bar on a terminal, a line every few seconds elsewhere. Always on standard error."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipeline.console import prefixed

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts tasks and the bytes that they stand for; a context manager."""

    def __init__(self, what: str, tasks: int, nbytes: int, unit: str = "tasks") -> None:
        self._what, self._tasks, self._bytes, self._unit = prefixed(what), tasks, nbytes, unit
        self._done, self._done_bytes = 0, 0
        self._started = self._spoke = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[size]}"), TimeRemainingColumn(), console=self._console)
            self._row = self._bar.add_task(self._what, total=self._tasks, size="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, nbytes: int) -> None:
        """One task more is done."""
        self._done += 1
        self._done_bytes += nbytes
        if self._bar:
            self._bar.update(self._row, completed=self._done, size=self._size())

    def add(self, tasks: int, nbytes: int = 0) -> None:
        """More tasks have become known."""
        self._tasks += tasks
        self._bytes += nbytes
        if self._bar:
            self._bar.update(self._row, total=self._tasks)

    def tick(self) -> None:
        """Called often; speaks seldom."""
        if not self._bar and time.monotonic() - self._spoke >= _SECONDS_BETWEEN_LINES:
            self._line()

    def log(self, line: str) -> None:
        """Something that a person wants to know now."""
        self._console.print(f"{self._what}: {line}", highlight=False, markup=False, soft_wrap=True)

    def _size(self) -> str:
        return f"{decimal(self._done_bytes)} of {decimal(self._bytes)}" if self._bytes else ""

    def _line(self) -> None:
        self._spoke = time.monotonic()
        seconds = self._spoke - self._started
        share = self._done_bytes / self._bytes if self._bytes else self._done / max(self._tasks, 1)
        left = f", about {seconds / share - seconds:.0f} s left" if 0 < share < 1 else ""
        size = f", {self._size()}" if self._bytes else ""
        self.log(f"{self._done} of {self._tasks} {self._unit}{size}, {seconds:.0f} s{left}")
