"""The `swsc` command: verbs, exit codes, and one line for a user's mistake."""

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module

from jobs.command_line.command import command_parser
from jobs.command_line.streams import safe_streams
from pipeline.engine import signals
from pipeline.errors import DISK_FULL_ERRNOS, DiskFull, SwscError

# Errors of the operating system that a user can mend.
_USER_ERRORS = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)
# Verbs that resume when the same command is run again.
_RESUMABLE = ("compress", "restore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Signals are handled before any import that takes long. Without `argv` they are handled until the process exits.

    Returns:
        The exit code: 0 done, 1 failed, 2 a user's mistake, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with safe_streams() as output_error:
        code = _run_interruptibly(words, until_exit=argv is None)
        if code == 0 and (error := output_error()):
            print(
                f"error: standard output: {error.strerror}; the printed results are lost, everything else is done",
                file=sys.stderr,
            )
            return 1
        return code


def _run_interruptibly(argv: list[str], until_exit: bool) -> int:
    with signals.handle_signals(until_exit=until_exit):
        try:
            code = _run(argv)
            signals.raise_if_interrupted()
            return code
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) or signals.is_interrupted()):
                raise
            signals.clear()
            print(f"interrupted{_resume_hint(argv)}", file=sys.stderr)
            return signals.EXIT_CODE


def _run(argv: list[str]) -> int:
    arguments = _parse(argv)
    try:
        return int(import_module(f"jobs.{arguments.verb}").run(arguments))
    except SwscError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        location = error.filename or "system"
        if error.errno in DISK_FULL_ERRNOS:
            print(f"error: {DiskFull.from_os_error(error)}", file=sys.stderr)
            return DiskFull.exit_code
        if error.errno in _USER_ERRORS:
            print(f"error: {location}: {error.strerror}; check path and permissions", file=sys.stderr)
            return 2
        print(f"error: {location}: {error.strerror or error}; check the disk{_resume_hint(argv)}", file=sys.stderr)
        return 1


def _resume_hint(argv: list[str]) -> str:
    resumable = argv[0] in _RESUMABLE if argv else False
    return ": finished files are kept; run the same command again to resume" if resumable else ""


def _is_utf8(word: str) -> bool:
    """Whether a report can hold a word. Python decodes bytes that are not UTF-8 to lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. The module of the verb is not imported for them, because importing torch takes seconds."""
    parser, verbs = command_parser(complete=argv[:1])
    for word in argv:
        if not _is_utf8(word):
            parser.error(f"{word!r}: not UTF-8; rename it")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        verbs[arguments.verb].reject(unknown)
    return arguments
