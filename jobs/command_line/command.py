"""The parser of the whole command, with one subparser per verb."""

from collections.abc import Collection

from jobs.command_line.parser import Parser
from jobs.command_line.verbs import EPILOG, VERBS
from pipeline import VERSION

_DESCRIPTION = (
    "Compress language models: SWSC (shared weights for similar channels) and RTN, on one machine or a Ray cluster."
)


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
        from jobs.command_line.arguments import add_arguments

        add_arguments(name, verbs[name])
    return parser, verbs
