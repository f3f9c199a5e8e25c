"""Ctrl-C and SIGTERM that are never lost.

Python raises KeyboardInterrupt wherever it happens to be, and drops it when that is a finalizer, a callback at a fork or a library
that swallows exceptions. So it is noted, too, and whoever begins something looks at the note. The first signal ends the run in an
orderly way; a second one ends the process at once, also while it calculates in a library that looks at no signals.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 0.5  # seconds in which two signals count as one: `timeout` and process managers send theirs twice
_ENDING = float("-inf")  # in place of the time of the first signal: whatever comes now is a second one
_first: float | None = None  # when the handler ran
_heard: float | None = None  # when the signal came, which may be long before a handler can run
_held = 0


@contextmanager
def listening(to_the_end: bool = False) -> Iterator[None]:
    """Note SIGINT and SIGTERM, which `ray job stop` and cluster managers send, and raise KeyboardInterrupt.

    Args:
        to_the_end: handlers stay, and any signal after this context ends the process at once: it has nothing left to do.
    """
    global _first, _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    woken = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(ear,), daemon=True).start()
    forget()
    listen()
    try:
        yield
    finally:
        if to_the_end:
            _first = _ENDING
            os.write(mouth, b"\0")  # behind the signals that came before: the thread may not have read them yet
        else:
            forget()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            os.close(mouth)


def listen() -> None:
    """Put the handlers in place, again if another library has replaced them; what was noted stays."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals are the main thread's, and so is Python's way to handle them
    for number in _SIGNALS:
        signal.signal(number, _note)


def check() -> None:
    """Raise KeyboardInterrupt if one was noted: it may have been dropped on its way."""
    if is_noted():
        raise KeyboardInterrupt


def is_noted() -> bool:
    """Whether a signal has come. Libraries in C or Rust raise errors of their own for a KeyboardInterrupt in what they call."""
    return _first is not None


@contextmanager
def held() -> Iterator[None]:
    """What must not be cut in two: a signal is noted at once, and raised at the end of the context."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held:
            check()


def forget() -> None:
    """It has arrived."""
    global _first, _heard
    _first = _heard = None
    exec(
        ""
    )  # Python remembers an interrupt in code that came as a string, as a dataclass does, and would end by SIGINT for it


def _note(number: int, frame: FrameType | None) -> None:
    global _first
    _cancel_alarm()
    now = time.monotonic()
    if _first is not None:
        if now - _first >= _SAME:
            _end()
        return
    _first = now
    if not _held:
        raise KeyboardInterrupt


def _hear(ear: int) -> None:
    """A thread's loop, until the other end of the pipe is closed: it hears a signal also while the main thread calculates."""
    global _heard
    while number := os.read(ear, 1):
        if number == b"\0":
            _heard = _ENDING
        if number[0] not in _SIGNALS:
            continue
        _cancel_alarm()
        now = time.monotonic()
        if _heard is None:
            _heard = now
        elif now - _heard >= _SAME:
            _end()
    os.close(ear)


def _cancel_alarm() -> None:
    """Cancel the alarm that Ray's C++ signal handler sets: while Ray starts it gets SIGTERM first, passes it on, and aborts 3 s later."""
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:  # no alarm of the program's own
        signal.alarm(0)


def _end() -> None:
    """End the process now; files appear whole or not at all, so nothing that is finished is lost."""
    shown = b"\x1b[?25h" if sys.__stderr__ and sys.__stderr__.isatty() else b""  # a progress bar has hidden the cursor
    os.write(2, shown + b"interrupted twice: ended at once\n")
    os._exit(EXIT_CODE)
