"""Flags of the command line, made from the settings: one field, one flag, one description."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline.config import ClusterSettings
from pipeline.errors import ConfigError, OutputError
from pipeline.model.places import Place, named, require_apart
from pipeline.model.store import Store
from pipeline.validation import Settings, read_config, validated

S = TypeVar("S", bound=Settings)
MODEL = "directory of a safetensors checkpoint, here or at s3://… or gs://…; a GGUF file, here; or a Hub id"


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as all others are said."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see `swsc --help`", file=sys.stderr)
        raise SystemExit(2)


def add_settings(parser: argparse.ArgumentParser, *kinds: type[Settings]) -> None:
    """A flag for each field, one for what several kinds share. A flag not given leaves no trace: the config file counts."""
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    for name, field in fields.items():
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=field.description)
        else:
            metavar = name.upper()
            parser.add_argument(flag, metavar=metavar, default=argparse.SUPPRESS, help=field.description)


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`: the same settings from a YAML file; flags win."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the same settings; flags win over it")


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
    require_apart(Place("--json", target), named(others))
    if target.is_local:
        if not target.parent.is_there:
            raise OutputError(f"{path}: No such file or directory; give a file in a directory that is there")
        if target.is_there or not os.access(target.parent.root, os.W_OK):
            raise OutputError(f"{path}: cannot be written; give another file")
    return target
