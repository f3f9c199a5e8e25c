"""Generates docs/cli.md from the parser and the settings; with `--check`, fails if the page is out of date."""

import argparse
import sys
from pathlib import Path

from jobs.command_line.command import command_parser
from jobs.command_line.flags import help_of
from jobs.command_line.parser import Parser
from jobs.command_line.verbs import VERBS
from pipeline.settings.sweep import SweepSettings

FILE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
# The verb whose tables of options other verbs refer to.
_FULL = "compress"
_TITLES = {"positional arguments": "arguments"}
_INTRODUCTION = """\
# Command line

Generated from the settings by `python -m jobs.command_line.docs`; edit the descriptions there, not this page.

| verb | what it does |
|---|---|
"""
_COMMON = """
`swsc VERB --help` shows the same; `swsc --version` prints the version. `python -m jobs VERB …` is the same command,
for submitted Ray jobs. Flags may be abbreviated as long as they stay unambiguous.

Exit codes: 0 done · 1 the run failed, and finished files are kept · 2 a mistake in the command or in a file that it
names, in one line on standard error that begins with `error:`; nothing is written · 130 interrupted.

`compress` and `plan` read settings from a YAML file, too (`--config FILE`): keys are the flags of the settings without
`--`, with `-` or `_`; switches are `true` or `false`; flags override the file. Unknown and ambiguous flags are reported
at once, then all mistakes in the values of flags and file at once.
"""


def page() -> str:
    """The whole page."""
    _, verbs = command_parser(VERBS)
    overview = "".join(f"| [`{name}`](#swsc-{name}) | {_cell(verb.summary)} |\n" for name, verb in VERBS.items())
    return f"{_INTRODUCTION}{overview}{_COMMON}" + "".join(_section(name, verbs) for name in verbs)


def _section(name: str, parsers: dict[str, Parser]) -> str:
    """The section of a verb, which refers to compress for groups of options that are equal."""
    verb, groups = VERBS[name], _groups(parsers[name])
    shared = _groups(parsers[_FULL]).items() if name != _FULL else set()
    alike = [title for title, table in groups.items() if (title, table) in shared]
    examples = "".join(f"    swsc {example}\n" for example in verb.examples)
    return "".join(
        [
            f"\n## swsc {name}\n\n    swsc {name} {verb.usage}\n\n{' '.join(verb.description.split())}\n\n{examples}",
            *(table for title, table in groups.items() if title not in alike),
            f"\nAlso the options of [{_FULL}](#swsc-{_FULL}) under: {'; '.join(alike)}.\n" if alike else "",
            _keys_of_a_sweep() if name == "sweep" else "",
        ]
    )


def _groups(parser: Parser) -> dict[str, str]:
    """Title of each group of arguments -> its table."""
    tables = {}
    for group in parser._action_groups:
        rows = "".join(_row(action) for action in group._group_actions if action.dest != "help")
        if rows:
            title = _TITLES.get(group.title or "", group.title or "")
            tables[title] = f"\n| {title[0].upper()}{title[1:]} | |\n|---|---|\n{rows}"
    return tables


def _row(action: argparse.Action) -> str:
    value = f" {action.metavar or '{' + ','.join(action.choices or ()) + '}'}" if action.nargs != 0 else ""
    names = f"{', '.join(action.option_strings)}{value}" if action.option_strings else str(action.metavar)
    return f"| `{_cell(names)}` | {_cell((action.help or '') % vars(action))} |\n"


def _keys_of_a_sweep() -> str:
    rows = [
        f"| `{name}` | {_cell(help_of(SweepSettings, name))} |\n"
        for name in SweepSettings.model_fields
        if name in SweepSettings.__annotations__
    ]
    return (
        "\nCONFIG has these keys, and those of the groups calibration and loading the model of `swsc compress`."
        " A variant has a `name`, optionally a `reference`, and the settings of a compression; an evaluation has"
        " those of `swsc evaluate --text`."
        f"\n\n| Keys of CONFIG | |\n|---|---|\n{''.join(rows)}"
    )


def _cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")


def main(argv: list[str]) -> int:
    """Write the page, or compare it with `--check`; exit code 1 if it is out of date."""
    if "--check" not in argv:
        FILE.write_text(page(), encoding="utf-8")
        return 0
    if FILE.exists() and FILE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{FILE.name} is out of date; run `python -m jobs.command_line.docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
