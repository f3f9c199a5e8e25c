"""A verb called in this process, with bounds on what the one call takes: seconds, and bytes at its peak."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jobs.cli import main

MOST_SECONDS, MOST_BYTES = 5.0, 300 << 20
_HANGS = 60  # seconds after which a call is interrupted, however busy the machine is
_PROC = Path("/proc/self")


def ends(*argv: str) -> int:
    """Exit code of a verb, which comes soon and takes little memory."""
    with bounded():
        code = main(argv)
    assert code in (0, 1, 2)
    return code


@contextmanager
def bounded() -> Iterator[None]:
    """Raise AssertionError if what is inside takes more than 5 s or 300 MB.

    Seconds in which it was ready to run and other processes had the processors are not counted; sleeping and waiting are.
    Bytes are those of the peak of this block above what the process holds at its begin, whatever it held before.
    """
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_HANGS)
    held, started = _reset_peak(), _own_seconds()
    try:
        yield
        took, peak = _own_seconds() - started, _peak() - held
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert took < MOST_SECONDS, f"took {took:.1f} s"
    assert peak < MOST_BYTES, f"took {peak >> 20} MiB"


def _hangs(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"has not ended after {_HANGS} s")


def _own_seconds() -> float:
    """Seconds of the clock without those in which the main thread waited for a processor; of the processors, where nothing counts those."""
    try:
        waited = int((_PROC / "schedstat").read_text().split()[1])
    except OSError:
        return time.process_time()
    return time.monotonic() - waited / 1e9


def _reset_peak() -> int:
    """Bytes of memory that the process holds, which is its peak from now on; where that cannot be set, its peak so far."""
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
