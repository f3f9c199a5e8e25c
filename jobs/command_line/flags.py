"""Flags of the command line, created from the settings: one field, one flag, one description."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from jobs.command_line.parser import Parser
from pipeline.errors import ConfigError, OutputError
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.validation import Option, Settings, read_config, validated
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.storage.store import Store

S = TypeVar("S", bound=Settings)


class Choices(tuple[str, ...]):
    """Values that help and completion show. Any value passes: the settings check it, and report all mistakes at once."""

    def __contains__(self, value: object) -> bool:
        return True


def add_settings(parser: Parser, *kinds: type[Settings]) -> None:
    """A flag for each field, in the group of the field. Flags that are not given leave no trace: the config file counts."""
    for kind in kinds:
        for heading in kind.groups:
            parser.group(heading)
    declared = {name: kind for kind in kinds for name in kind.model_fields}
    for name, kind in declared.items():
        add_setting(parser.group(heading_of(kind, name)), kind, name)


def add_setting(group: Any, kind: type[Settings], name: str, **replaced: Any) -> None:
    """The flag of one field.

    Args:
        replaced: arguments of `add_argument` that differ from those of the field.
    """
    annotation = kind.model_fields[name].annotation
    given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_of(kind, name)}
    if annotation is bool:
        given["action"] = "store_true"
    elif choices := _choices(annotation):
        given["choices"] = Choices(choices)
    else:
        given["metavar"] = _metavar(kind, name)
    given |= replaced
    group.add_argument(f"--{name.replace('_', '-')}", **given | {"help": given["help"].replace("%", "%%")})


def help_of(kind: type[Settings], name: str) -> str:
    """Description and default of a setting."""
    field = kind.model_fields[name]
    default = _option(kind, name).default or _written(field.default)
    return f"{field.description} [default: {default}]" if default else str(field.description)


def heading_of(kind: type[Settings], name: str) -> str:
    """The group of a setting: the one that its field names, else the first of the class which declares it."""
    bases = [base for base in reversed(kind.__mro__) if issubclass(base, Settings)]
    declaring = next(base for base in bases if name in base.model_fields)
    return _option(kind, name).group or declaring.groups[0]


def _option(kind: type[Settings], name: str) -> Option:
    return next((one for one in kind.model_fields[name].metadata if isinstance(one, Option)), Option())


def _written(default: object) -> str:
    """A default as it would be typed; empty for none, for a switch that is off, and for a required setting."""
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


def settings_of(arguments: argparse.Namespace, *kinds: type[S]) -> list[Any]:
    """The settings that were asked for, from flags over config file; ConfigError names every mistake of all kinds."""
    given = vars(arguments)
    path = given.get("config")
    filed = read_config(Path(path)) if path else {}
    known = {name for kind in kinds for name in kind.model_fields}
    unknown = sorted(set(filed) - known)
    findings = [f"unknown key {key}; known are {', '.join(sorted(known))}" for key in unknown]
    result = []
    for kind in kinds:
        values = {name: value for name, value in {**filed, **given}.items() if name in kind.model_fields}
        try:
            result.append(validated(kind, values))
        except ConfigError as error:
            findings.append(str(error).removeprefix("settings: "))
    if findings:
        raise ConfigError("; ".join(findings))
    return result


def cluster_of(arguments: argparse.Namespace) -> ClusterSettings:
    """Where the work is done."""
    return validated(ClusterSettings, {k: v for k, v in vars(arguments).items() if k in ClusterSettings.model_fields})


def writable(path: str, others: Iterable[tuple[str, str | None]] = ()) -> Store:
    """A file that --json is to write, as a store of its directory and name; it is not made: a run that is refused leaves none.

    Args:
        others: what the verb reads, by its name on the command line: the file is none of it, and lies in none of it.

    Raises:
        OutputError: a file on a disk that cannot be written, or one that is read.
    """
    target = Store.at(path)
    if target.is_local and os.path.exists(target.root) and not os.path.isfile(target.root):
        raise OutputError(f"{path}: is no plain file; give another")
    if target.is_local and os.path.islink(target.root):
        target = Store(os.path.realpath(target.root))  # what is written is what the link leads to, as by any other tool
    require_disjoint_paths(UserPath("--json", target), user_paths(others))
    if target.is_local:
        if not target.parent.is_there:
            raise OutputError(f"{path}: No such file or directory; give a file in a directory that is there")
        if target.is_there or not os.access(target.parent.root, os.W_OK):
            raise OutputError(f"{path}: cannot be written; give another file")
    return target
