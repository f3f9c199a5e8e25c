"""Types of settings, and their validation by pydantic: one ConfigError of one line names all mistakes at once."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pipeline.errors import ConfigError
from pipeline.settings import bounded_yaml

# Largest configuration file in bytes.
_MAX_BYTES = 1 << 20
# Characters that no path may have: null and unpaired surrogates.
_INVALID_CHARACTER = re.compile("[\\0\ud800-\udfff]")
# Characters of a refused value that an error shows.
_SHOWN = 60


def _split_at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _require_regex(value: object) -> object:
    if value is None:
        return value
    if not isinstance(value, str):
        raise ValueError("not a regular expression")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def _to_int(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
Regex = Annotated[str | None, BeforeValidator(_require_regex)]
Width = Annotated[Literal[4, 6, 8], BeforeValidator(_to_int)]


@dataclass(frozen=True)
class Option:
    """How help and docs/cli.md show a setting; metadata of its field.

    Attributes:
        metavar: placeholder of the value; derived from the type if empty.
        default: what applies if the setting is not given, for a field whose own default is None.
        group: heading under which the flag is listed; the first one of the declaring class if empty.
    """

    metavar: str = ""
    default: str = ""
    group: str = ""


class Settings(BaseModel):
    """Base class of all settings: immutable, without unknown keys.

    Attributes:
        groups: headings under which help and docs/cli.md list the flags that the class declares, in their order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    groups: ClassVar[tuple[str, ...]] = ("options",)


S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: dict[str, Any], source: str = "settings") -> S:
    """Return `kind(**values)`.

    Raises:
        ConfigError: one line that begins with `source` and names every mistake.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # pydantic counts a list whose only member is wrong as too short as well: one mistake, one message.
        wrong_inside = {item["loc"][0] for item in error.errors() if len(item["loc"]) > 1}
        items = [i for i in error.errors() if i["type"] != "too_short" or i["loc"][0] not in wrong_inside]
        mistakes = list(map(_message, items))
        if any(item["type"] == "extra_forbidden" and len(item["loc"]) == 1 for item in items):
            mistakes.append(f"known keys: {', '.join(kind.model_fields)}")
        raise ConfigError(f"{source}: {'; '.join(mistakes)}") from None


def _message(item: Any) -> str:
    """One mistake in words; `item`: an entry of `ValidationError.errors()`."""
    key = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if item["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {message}, got {item['input']!r}" if key else message


def _require_plain_value(value: object) -> None:
    """Raise ValueError for a value that no setting has.

    Settings are text, numbers, lists and mappings. Text must not hold null characters or unpaired surrogates, which no
    path may have.
    """
    if isinstance(value, str) and _INVALID_CHARACTER.search(value):
        raise ValueError(f"{value[:_SHOWN]!r}: a text with a null character or an unpaired surrogate")
    if isinstance(value, bytes | set | tuple):
        raise ValueError(f"{str(value)[:_SHOWN]}: expected text, numbers, lists and mappings")
    members = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for member in members:
        _require_plain_value(member)


def read_config(path: Path) -> dict[str, Any]:
    """Read keys and values of a YAML file; keys of the top level may be spelled with "-" as flags are.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not a YAML mapping of plain values.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"config file {path}: {size:,} bytes, more than the limit of {_MAX_BYTES:,}; shorten it")
        loaded = bounded_yaml.load(path.read_text(encoding="utf-8"), unique=True)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise ConfigError(f"config file {path}: not YAML: {' '.join(str(error).split())}; correct it") from None
    try:
        _require_plain_value(loaded)
    except ValueError as error:
        raise ConfigError(f"config file {path}: {error}; correct it") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path}: expected a mapping of settings, got {type(loaded).__name__}")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
