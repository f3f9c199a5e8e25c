"""Run a verb in this process, with limits on the time and the peak memory of that one call."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jobs.cli import main

MAX_SECONDS, MAX_BYTES = 5.0, 300 << 20
# seconds after which a call is interrupted, however busy the machine is
_TIMEOUT = 60
_PROC = Path("/proc/self")


def ends(*argv: str) -> int:
    """Exit code of a verb, which has to end within the limits of `bounded`."""
    with bounded():
        code = main(argv)
    assert code in (0, 1, 2)
    return code


@contextmanager
def bounded() -> Iterator[None]:
    """Raise AssertionError if the block takes more than 5 s or 300 MB.

    Time during which the main thread waits for a processor that other processes use does not count; sleeping and
    waiting do. Memory is the peak during the block minus what the process holds at its start.
    """
    previous = signal.signal(signal.SIGALRM, _raise_timeout)
    signal.alarm(_TIMEOUT)
    bytes_at_start, started = _reset_peak(), _busy_seconds()
    try:
        yield
        seconds, peak = _busy_seconds() - started, _peak() - bytes_at_start
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
    assert peak < MAX_BYTES, f"took {peak >> 20} MiB"


def _raise_timeout(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"has not ended after {_TIMEOUT} s")


def _busy_seconds() -> float:
    """Wall-clock seconds without the waits of the main thread for a processor; CPU seconds without /proc."""
    try:
        waited = int((_PROC / "schedstat").read_text().split()[1])
    except OSError:
        return time.process_time()
    return time.monotonic() - waited / 1e9


def _reset_peak() -> int:
    """Reset the peak to the current memory of the process, in bytes; where that is impossible, the peak so far."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if _PROC.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    (line,) = (line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10
