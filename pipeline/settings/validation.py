"""How settings are checked: pydantic does, and `validated` turns its findings into one line that names all mistakes at once."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pipeline.errors import ConfigError
from pipeline.settings import bounded_yaml

_MOST = 1 << 20  # bytes of a configuration file
_NO_TEXT = re.compile("[\\0\ud800-\udfff]")
_SHOWN = 60  # characters of a value that is refused


def _comma_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _compiled(value: object) -> object:
    if value is None:
        return value
    if not isinstance(value, str):
        raise ValueError("not a regular expression")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
Regex = Annotated[str | None, BeforeValidator(_compiled)]


@dataclass(frozen=True)
class Option:
    """How help and docs/cli.md show a setting, as metadata of its field.

    Attributes:
        metavar: placeholder of the value; by default derived from the type.
        default: what applies if the setting is not given, where the field's own default is None.
        group: heading under which the flag is listed; by default the first of the class which declares the field.
    """

    metavar: str = ""
    default: str = ""
    group: str = ""


class Settings(BaseModel):
    """Base of all settings: unknown keys are mistakes, values never change.

    Attributes:
        groups: headings under which help and docs/cli.md list the flags that the class declares, in their order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    groups: ClassVar[tuple[str, ...]] = ("options",)


Width = Annotated[Literal[4, 6, 8], BeforeValidator(_number)]

S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: dict[str, Any], source: str = "settings") -> S:
    """`kind(**values)`, or a ConfigError of one line that names every mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # A list whose only member is wrong counts as too short as well: one mistake, one finding.
        wrong_inside = {item["loc"][0] for item in error.errors() if len(item["loc"]) > 1}
        items = [i for i in error.errors() if i["type"] != "too_short" or i["loc"][0] not in wrong_inside]
        found = "; ".join(_finding(kind, item) for item in items)
        raise ConfigError(f"{source}: {found}") from None


def _finding(kind: type[Settings], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return (
            f"{place}: unknown key; known are {', '.join(kind.model_fields)}"
            if "." not in place
            else f"{place}: unknown key"
        )
    if item["type"] == "missing":
        return f"{place}: missing"
    return f"{place}: {message}, got {item['input']!r}" if place else message


def _require_plain(value: object) -> None:
    """Raise ValueError for what no setting is: bytes, sets, and text with a null character or an unpaired surrogate, which no path may have."""
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise ValueError(f"{value[:_SHOWN]!r}: a null character or an unpaired surrogate in a text")
    if isinstance(value, bytes | set | tuple):
        raise ValueError(f"{str(value)[:_SHOWN]}: wanted text, numbers, lists and mappings")
    for one in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_plain(one)


def read_config(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file; those of the top level may be spelled as flags."""
    try:
        if (size := path.stat().st_size) > _MOST:
            raise ConfigError(f"config file {path}: {size:,} bytes, at most {_MOST:,} are read; give another")
        loaded = bounded_yaml.load(path.read_text(encoding="utf-8"), unique=True)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise ConfigError(f"config file {path}: not YAML: {' '.join(str(error).split())}; correct it") from None
    try:
        _require_plain(loaded)
    except ValueError as error:
        raise ConfigError(f"config file {path}: {error}; correct it") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path}: wanted a mapping of settings, got {type(loaded).__name__}")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
