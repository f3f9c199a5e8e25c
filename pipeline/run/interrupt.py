"""Ctrl-C that is never lost.

Python raises KeyboardInterrupt wherever it happens to be, and drops it when that is the finalizer of an object, of which
handles of the object store have many. So it is noted, too, and the driver's loop looks at the note.
"""

import signal
from types import FrameType

_seen = False


def listen() -> None:
    """From now on note SIGINT and SIGTERM, which `ray job stop` and cluster managers send, and raise KeyboardInterrupt."""
    forget()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)


def check() -> None:
    """Raise KeyboardInterrupt if one was noted and has not arrived."""
    if _seen:
        raise KeyboardInterrupt


def forget() -> None:
    """It has arrived."""
    global _seen
    _seen = False


def _note(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
