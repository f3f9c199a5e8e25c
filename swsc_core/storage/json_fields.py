"""Dataclass fields that state which JSON values they accept, and the reader that checks them.

config.json may come from anywhere: a count of blocks that is a billion, say, would be counted through. Each value is checked
before an object is made of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | JsonObject | None"
"""A value that JSON can hold; for values that this project writes and whose keys no dataclass lists."""

JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object."""

Check = Callable[[Any], bool]
_SHOWN = 40  # characters of a refused value in an error


def integer(least: int) -> Check:
    """Accepts integers of at least `least`; a bool is none."""
    return lambda value: type(value) is int and value >= least


def one_of(*known: Any) -> Check:
    """Accepts values equal to one of `known` and of the same type: True is not 1."""
    return lambda value: any(type(value) is type(one) and value == one for one in known)


def integers(count: int, least: int) -> Check:
    """Accepts lists of `count` integers of at least `least`."""
    return lambda value: isinstance(value, list) and len(value) == count and all(map(integer(least), value))


FLAG = one_of(True, False)


def json_field(check: Check, wanted: str, default: Any = MISSING) -> Any:
    """A dataclass field that is read from the JSON key of its own name.

    Args:
        check: accepts a JSON value.
        wanted: what `check` accepts, in words.
        default: the value where the key is absent; a field without a default is required. A default is not written.
    """
    return field(default=default, metadata={"check": check, "wanted": wanted})


def read_fields(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the dataclass `kind` from a JSON object; lists become tuples and unknown keys are ignored.

    Raises:
        ValueError: a value that is missing or of the wrong kind; names the key.
    """
    found: dict[str, Any] = {}
    for one in _json_fields(kind):
        if one.name not in data:
            if one.default is MISSING:
                raise ValueError(f"{one.name} is missing")
            continue
        value = data[one.name]
        if not one.metadata["check"](value):
            raise ValueError(f"{one.name} is {str(value)[:_SHOWN]}, wanted {one.metadata['wanted']}")
        found[one.name] = tuple(value) if isinstance(value, list) else value
    return found


def written_fields(value: Any) -> dict[str, Any]:
    """Inverse of `read_fields`: the JSON object of a dataclass instance."""
    found = {}
    for one in _json_fields(value):
        own = getattr(value, one.name)
        if own != one.default:
            found[one.name] = list(own) if isinstance(own, tuple) else own
    return found


def _json_fields(kind: Any) -> list[Field[Any]]:
    return [one for one in fields(kind) if "check" in one.metadata]
