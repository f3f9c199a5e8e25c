"""Interrupts by SIGINT and SIGTERM that no library can swallow.

Python raises KeyboardInterrupt at an arbitrary point of the main thread, and drops it if that point is a finalizer, a
fork callback or a library that catches all exceptions. The handlers of this module therefore also record the interrupt,
and long-running code checks the record. The first signal ends the run in an orderly way. A second signal ends the
process at once, even while it computes in a library that never returns to the interpreter.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Two signals within this time count as one, because `timeout` and process managers send theirs twice.
_SAME_SIGNAL_SECONDS = 0.5
# Stands for the time of the first signal once the command has ended: the next signal counts as the second one.
_ALWAYS_AGO = float("-inf")
# Time at which the handler ran.
_handled_at: float | None = None
# Time at which the signal arrived, which may be long before a handler can run.
_arrived_at: float | None = None
_deferrals = 0


@contextmanager
def handle_signals(until_exit: bool = False) -> Iterator[None]:
    """Record SIGINT and SIGTERM, which `ray job stop` and cluster managers send, and raise KeyboardInterrupt.

    Outside the main thread this context does nothing.

    Args:
        until_exit: the handlers stay after the context, and the next signal ends the process at once, because no work
            is left.
    """
    global _handled_at, _arrived_at
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()
    clear()
    install_handlers()
    previous_hook, sys.unraisablehook = sys.unraisablehook, _without_interrupts(sys.unraisablehook)
    try:
        yield
    finally:
        if until_exit:
            _handled_at = _ALWAYS_AGO
            # Written behind earlier signals, which the thread may not have read yet.
            os.write(write_end, b"\0")
        else:
            clear()
            sys.unraisablehook = previous_hook
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_wakeup)
            os.close(write_end)


def install_handlers() -> None:
    """Install the handlers, or reinstall them after a library has replaced them.

    A recorded interrupt stays recorded.
    """
    # Python accepts handlers from the main thread only.
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if one was recorded, because a library may have dropped the exception itself."""
    if is_interrupted():
        raise KeyboardInterrupt


def is_interrupted() -> bool:
    """Return whether an interrupt was recorded.

    Libraries in C or Rust may turn a KeyboardInterrupt into errors of their own.
    """
    return _handled_at is not None


@contextmanager
def deferred() -> Iterator[None]:
    """Delay KeyboardInterrupt until the end of this context, for a section that must not be left half done."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if not _deferrals:
            raise_if_interrupted()


def clear() -> None:
    """Forget the recorded interrupt, after it was handled."""
    global _handled_at, _arrived_at
    _handled_at = _arrived_at = None
    # CPython remembers an interrupt of code compiled from a string (dataclasses compile some) and would end the process
    # by SIGINT. Running any such code resets that.
    exec("")


def _without_interrupts(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """`hook` for exceptions that Python drops, such as those of finalizers, without KeyboardInterrupt.

    The interrupt is recorded and takes effect later. A traceback would make it look like a fault.
    """

    def report(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    return report


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _handled_at
    _cancel_alarm()
    now = time.monotonic()
    if _handled_at is not None:
        if now - _handled_at >= _SAME_SIGNAL_SECONDS:
            _exit_now()
        return
    _handled_at = now
    if not _deferrals:
        raise KeyboardInterrupt


def _watch(read_end: int) -> None:
    """Read signal numbers until the pipe is closed. In a thread, signals count while the main thread computes."""
    global _arrived_at
    while number := os.read(read_end, 1):
        if number == b"\0":
            _arrived_at = _ALWAYS_AGO
        if number[0] not in _SIGNALS:
            continue
        _cancel_alarm()
        now = time.monotonic()
        if _arrived_at is None:
            _arrived_at = now
        elif now - _arrived_at >= _SAME_SIGNAL_SECONDS:
            _exit_now()
    os.close(read_end)


def _cancel_alarm() -> None:
    """Cancel the alarm of Ray's C++ signal handler.

    While Ray starts, that handler gets SIGTERM first, passes it on, and aborts the process 3 s later.
    """
    # A handler other than the default would mean that the program itself has set the alarm.
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.alarm(0)


def _exit_now() -> None:
    """End the process. Finished files are safe, because each file is renamed into place once it is complete."""
    # A progress bar has hidden the cursor.
    show_cursor = b"\x1b[?25h" if sys.__stderr__ and sys.__stderr__.isatty() else b""
    os.write(2, show_cursor + b"interrupted twice: ended at once\n")
    os._exit(EXIT_CODE)
