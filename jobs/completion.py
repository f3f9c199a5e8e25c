"""`swsc completion SHELL`: a script that completes verbs, flags, choices and paths, made by shtab from the parser."""

import argparse

import shtab

from jobs.command_line.command import command_parser
from jobs.command_line.parser import Parser
from jobs.command_line.verbs import VERBS

_FILES = {"FILE", "CONFIG", "TEXT", "hub|FILE"}
_DIRECTORIES = {"DIR", "MODEL", "OUTPUT", "DENSE"}


def run(arguments: argparse.Namespace) -> int:
    parser, verbs = command_parser(VERBS)
    for verb in verbs.values():
        _complete_paths(verb)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_paths(parser: Parser) -> None:
    """Mark the arguments whose values are paths, as shtab asks for it."""
    for action in parser._actions:
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
