"""An argument parser with named groups that reports a mistake in one line."""

import argparse
import sys
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias

# The class of argument groups has no public name.
Group: TypeAlias = argparse._ArgumentGroup


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, like every other error of the command."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._headings: dict[str, Group] = {}

    def group(self, heading: str) -> Group:
        """The argument group with this heading, created when it is first used."""
        if heading not in self._headings:
            self._headings[heading] = self.add_argument_group(heading)
        return self._headings[heading]

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line and exit with code 2."""
        print(f"error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The flags that an abbreviation stands for.

        An ambiguous one counts as unknown, so that `reject` reports it with all others instead of argparse alone.
        """
        matches: list[Any] = super()._get_option_tuples(option_string)
        return matches if len(matches) == 1 else []

    def reject(self, unknown: Collection[str]) -> NoReturn:
        """Report unknown arguments, with the flags that each abbreviates or the most similar one, and exit with 2."""
        similar = [match for word in unknown for match in self._similar(word.partition("=")[0])]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        self.error(f"unknown arguments: {' '.join(unknown)}{hint}")

    def _similar(self, flag: str) -> list[str]:
        """The flags that `flag` abbreviates, else the most similar one."""
        known = list(self._option_string_actions)
        begun = [name for name in known if name.startswith(flag)] if flag.startswith("--") else []
        return begun or get_close_matches(flag, known, 1)
