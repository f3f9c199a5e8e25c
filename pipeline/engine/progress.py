"""Progress of a stage on standard error: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from pipeline.console import prefixed

_SECONDS_BETWEEN_LINES = 5.0
# Share of the work that must be finished before the remaining time is estimated. The first tasks may be tiny, and then
# their time is mostly overhead.
_MIN_SHARE = 0.02


class Progress:
    """Counts finished tasks, their units, bytes and estimated work; a context manager.

    The remaining time is estimated from the rate since the first task started: work per second, or units per second if
    the work is not known. Starting workers does not count.
    """

    def __init__(
        self,
        stage: str,
        units: int,
        work: float,
        nbytes: int = 0,
        unit: str = "tasks",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            stage: name of the stage, which starts every line.
            units: number of units in all tasks.
            work: estimated work of all tasks, in any unit; 0 if it is not known.
            nbytes: bytes of all tasks, which lines show; 0 if they are not known.
            unit: plural name of the units.
            clock: time in seconds.
        """
        self._stage, self._unit, self._clock = prefixed(stage), unit, clock
        self._units, self._work, self._bytes = units, work, nbytes
        self._done_units, self._done_work, self._done_bytes = 0, 0.0, 0
        self._done_tasks = 0
        self._running, self._most_running, self._running_units = 0, 0, 0
        self._created = self._last_line = clock()
        self._first_start: float | None = None
        self._console = Console(stderr=True)
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            texts = (TextColumn("{task.fields[size]}"), TextColumn("{task.fields[left]}"))
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts)
            self._bar = Bar(*columns, console=self._console)
            self._row = self._bar.add_task(self._stage, total=self._units, size="", left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._print_line()

    def task_started(self, units: int = 1) -> None:
        """Note that a task of some units starts."""
        if self._first_start is None:
            self._first_start = self._clock()
        self._running += 1
        self._running_units += units
        self._most_running = max(self._most_running, self._running)

    def task_ended(self, units: int = 1) -> None:
        """Note that a task of some units is no longer under way, finished or not."""
        self._running -= 1
        self._running_units -= units

    def advance(self, work: float, nbytes: int = 0, units: int = 1) -> None:
        """Count one finished task, with its work, bytes and units."""
        self._done_tasks += 1
        self._done_units += units
        self._done_work += work
        self._done_bytes += nbytes
        self._update_bar()

    def add(self, units: int, work: float = 0) -> None:
        """Add units that were not known when the stage began."""
        self._units += units
        self._work += work
        self._update_bar()

    def tick(self) -> None:
        """Refresh the display; call it often."""
        if self._bar:
            self._update_bar()
        elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def log(self, line: str) -> None:
        """Print a line that concerns this stage."""
        self._console.print(f"{self._stage}: {line}", highlight=False, markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Estimate the remaining time.

        None until as many tasks have finished as run at a time, because the tasks under way would count as untouched,
        and until `_MIN_SHARE` of the work is finished. None again when all is finished.
        """
        share = self._done_work / self._work if self._work else self._done_units / max(self._units, 1)
        if self._first_start is None or self._done_tasks < max(1, self._most_running) or not _MIN_SHARE <= share < 1:
            return None
        return (self._clock() - self._first_start) * (1 - share) / share

    def _update_bar(self) -> None:
        if self._bar:
            size, left = self._size(), self._left()
            self._bar.update(self._row, total=self._units, completed=self._done_units, size=size, left=left)

    def _print_line(self) -> None:
        self._last_line = self._clock()
        counted = f"{self._done_units} of {self._units} {self._unit}"
        parts = (counted, self._under_way(), self._size(), self._elapsed(), self._left())
        self.log(", ".join(filter(None, parts)))

    def _under_way(self) -> str:
        """Units that workers have started, as long as nothing else shows that the stage moves."""
        return f"{self._running_units} under way" if self._running_units and not self._done_units else ""

    def _size(self) -> str:
        return f"{decimal(self._done_bytes)} of {decimal(self._bytes)}" if self._bytes else ""

    def _elapsed(self) -> str:
        return f"{self._last_line - self._created:.0f} s"

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "" if seconds is None else f"about {seconds:.0f} s left"
