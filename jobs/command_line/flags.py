"""Flags of the command line, created from the settings: one field, one flag, one description."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from jobs.command_line.parser import Group, Parser
from pipeline.errors import ConfigError
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.validation import Option, Settings, read_config, validated

S = TypeVar("S", bound=Settings)
# Key of a config file that only a sweep has.
SWEEP_KEY = "variants"


class Choices(tuple[str, ...]):
    """Values for help and completion. The parser accepts other values: the settings report all mistakes at once."""

    def __contains__(self, value: object) -> bool:
        return True


def add_settings(parser: Parser, *kinds: type[Settings]) -> None:
    """Add a flag for each field, in the group of the field. A flag that is not given is not in the parsed arguments."""
    for kind in kinds:
        for heading in kind.groups:
            parser.group(heading)
    declared = {name: kind for kind in kinds for name in kind.model_fields}
    for name, kind in declared.items():
        add_setting(parser.group(heading_of(kind, name)), kind, name)


def add_setting(group: Group, kind: type[Settings], name: str, **replaced: Any) -> None:
    """Add the flag of one field.

    Args:
        replaced: arguments of `add_argument` that replace those of the field.
    """
    annotation = kind.model_fields[name].annotation
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_of(kind, name)}
    if annotation is bool:
        options["action"] = "store_true"
    elif choices := _choices(annotation):
        options["choices"] = Choices(choices)
    else:
        options["metavar"] = _metavar(kind, name)
    options |= replaced
    group.add_argument(f"--{name.replace('_', '-')}", **options | {"help": options["help"].replace("%", "%%")})


def help_of(kind: type[Settings], name: str) -> str:
    """Description and default of a setting."""
    field = kind.model_fields[name]
    default = _option(kind, name).default or _written(field.default)
    return f"{field.description} [default: {default}]" if default else str(field.description)


def heading_of(kind: type[Settings], name: str) -> str:
    """The group of a setting: the one that its field names, else the first group of the class that declares it."""
    bases = [base for base in reversed(kind.__mro__) if issubclass(base, Settings)]
    declaring = next(base for base in bases if name in base.model_fields)
    return _option(kind, name).group or declaring.groups[0]


def _option(kind: type[Settings], name: str) -> Option:
    return next((item for item in kind.model_fields[name].metadata if isinstance(item, Option)), Option())


def _written(default: object) -> str:
    """A default as a user types it; empty for None, for a switch that is off, and for a required setting."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return "true" if default else ""
    return f"{default:g}" if isinstance(default, int | float) else default if isinstance(default, str) else ""


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal, wherever it is in an annotation."""
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(value for part in get_args(annotation) for value in _choices(part))


def _metavar(kind: type[Settings], name: str) -> str:
    """Placeholder of a value."""
    annotation = kind.model_fields[name].annotation
    types = {annotation, *get_args(annotation)}
    return _option(kind, name).metavar or ("N" if int in types else "X" if float in types else name.upper())


class ParsedSettings:
    """Settings of several classes; `settings[Class]` gives those of one."""

    def __init__(self, settings: Iterable[Settings]) -> None:
        self._settings: dict[type[Settings], Settings] = {type(item): item for item in settings}

    def __getitem__(self, kind: type[S]) -> S:
        return cast(S, self._settings[kind])


def settings_of(arguments: argparse.Namespace, *kinds: type[Settings]) -> ParsedSettings:
    """Settings from flags and config file, where flags win; ConfigError names the mistakes in all of them."""
    flags = vars(arguments)
    path = flags.get("config")
    file_values = read_config(Path(path)) if path else {}
    if SWEEP_KEY in file_values:
        raise ConfigError(f"config file {path}: describes a sweep; run it by `swsc sweep {path} --out DIR`")
    known = {name for kind in kinds for name in kind.model_fields}
    unknown = sorted(set(file_values) - known)
    mistakes = [f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"] if unknown else []
    settings = []
    for kind in kinds:
        values = {name: value for name, value in {**file_values, **flags}.items() if name in kind.model_fields}
        try:
            settings.append(validated(kind, values))
        except ConfigError as error:
            mistakes.append(str(error).removeprefix("settings: "))
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return ParsedSettings(settings)


def cluster_of(arguments: argparse.Namespace) -> ClusterSettings:
    """Settings of workers and cluster, of a verb without a config file."""
    fields = ClusterSettings.model_fields
    return validated(ClusterSettings, {name: value for name, value in vars(arguments).items() if name in fields})
