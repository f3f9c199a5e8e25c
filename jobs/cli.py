"""The `swsc` command: verbs, exit codes, and one line for a user's mistake."""

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module

from jobs.command_line.command import command_parser
from jobs.command_line.streams import lasting
from pipeline.engine import signals
from pipeline.errors import DISK_FULL_ERRNOS, DiskFull, SwscError

_OF_THE_USER = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip
_GOES_ON = ("compress", "restore")  # verbs whose finished work an interruption leaves for the next call


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 failed, 2 a user's mistake, 130 interrupted.

    Signals are listened to before anything is imported that takes long; without `argv` to the end of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    with lasting() as lost:
        code = _listening(given, to_the_end=argv is None)
        if code == 0 and (error := lost()):
            print(
                f"error: standard output: {error.strerror}; what was printed is lost, all else is done", file=sys.stderr
            )
            return 1
        return code


def _listening(given: list[str], to_the_end: bool) -> int:
    with signals.handle_signals(until_exit=to_the_end):
        try:
            code = _run(given)
            signals.raise_if_interrupted()
            return code
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) or signals.is_interrupted()):
                raise
            signals.clear()
            print(f"interrupted{_kept(given)}", file=sys.stderr)
            return signals.EXIT_CODE


def _run(argv: list[str]) -> int:
    arguments = _parse(argv)
    try:
        return int(import_module(f"jobs.{arguments.verb}").run(arguments))
    except SwscError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = error.filename or "system"
        if error.errno in DISK_FULL_ERRNOS:
            print(f"error: {DiskFull.of(error)}", file=sys.stderr)
            return DiskFull.exit_code
        if error.errno in _OF_THE_USER:
            print(f"error: {where}: {error.strerror}; check path and rights", file=sys.stderr)
            return 2
        print(f"error: {where}: {error.strerror or error}; look at the disk{_kept(argv)}", file=sys.stderr)
        return 1


def _kept(argv: list[str]) -> str:
    goes_on = argv[0] in _GOES_ON if argv else False
    return ": what is finished is kept; run the same command again to go on" if goes_on else ""


def _is_text(word: str) -> bool:
    """Whether results and reports can hold it: Python takes bytes that are no UTF-8 for lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. The module of the verb is not imported for them, because torch takes seconds."""
    parser, verbs = command_parser(complete=argv[:1])
    for word in argv:
        if not _is_text(word):
            parser.error(f"{word!r}: not UTF-8; rename it")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        verbs[arguments.verb].reject(unknown)
    return arguments
