"""The parser of the command line: groups of arguments, examples, and one line for a mistake. Needs no library at all."""

import argparse
import sys
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, NoReturn

from jobs.verbs import EPILOG, VERBS
from pipeline import VERSION

_DESCRIPTION = (
    "Compress language models: SWSC (shared weights for similar channels) and RTN, on one machine or a Ray cluster."
)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, as every other error of the command is reported."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._headings: dict[str, Any] = {}

    def group(self, heading: str) -> Any:
        """The argument group with this heading, created when it is first used."""
        if heading not in self._headings:
            self._headings[heading] = self.add_argument_group(heading)
        return self._headings[heading]

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line and exit with code 2."""
        print(f"error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def reject(self, unknown: Collection[str]) -> NoReturn:
        """Report arguments that the parser does not know, with the most similar flag of each."""
        known = list(self._option_string_actions)
        similar = [match for word in unknown for match in get_close_matches(word.partition("=")[0], known, 1)]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        self.error(f"unknown arguments: {' '.join(unknown)}{hint}")


def command_parser(complete: Collection[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of `swsc` and those of its verbs.

    Args:
        complete: verbs whose parsers get their arguments; those of the other verbs stay empty, which saves the import
            of the settings.
    """
    parser = Parser(prog="swsc", usage="swsc VERB …", description=_DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "-V", "--version", action="version", version=f"swsc {VERSION}", help="Show the version and exit."
    )
    subparsers = parser.add_subparsers(
        title="verbs", dest="verb", metavar="VERB", required=True, parser_class=Parser, prog="swsc"
    )
    verbs = {
        name: subparsers.add_parser(
            name,
            help=verb.summary,
            description=verb.description,
            usage=f"swsc {name} {verb.usage}",
            epilog=verb.epilog,
        )
        for name, verb in VERBS.items()
    }
    for name in VERBS.keys() & set(complete):
        from jobs.arguments import add_arguments

        add_arguments(name, verbs[name])
    return parser, verbs
