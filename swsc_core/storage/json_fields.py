"""Dataclass fields that state which JSON values they accept, and the functions that read and write them.

config.json is untrusted input: a loop over a number of blocks that is a billion would not end. Each value is therefore
checked before an object is constructed from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | JsonObject | None"
"""A value that JSON can hold; for values that this project writes and whose keys no dataclass lists."""

JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object."""

Check = Callable[[Any], bool]
# Characters of a refused value in an error.
_SHOWN = 40


def integer(least: int) -> Check:
    """Accepts integers of at least `least`, but no bool."""
    return lambda value: type(value) is int and value >= least


def one_of(*choices: JsonValue) -> Check:
    """Accepts values equal to one of `choices` and of the same type: True is not 1."""
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def integers(count: int, least: int) -> Check:
    """Accepts lists of `count` integers of at least `least`."""
    return lambda value: isinstance(value, list) and len(value) == count and all(map(integer(least), value))


def non_empty_string(value: object) -> bool:
    """Accepts strings of at least one character."""
    return isinstance(value, str) and bool(value)


FLAG = one_of(True, False)


def json_field(check: Check, expected: str, default: Any = MISSING) -> Any:
    """A dataclass field that is read from the JSON key of its own name.

    Args:
        check: accepts a JSON value.
        expected: what `check` accepts, in words, for errors.
        default: the value if the key is absent; a field without a default is required. A default is not written.
    """
    return field(default=default, metadata={"check": check, "expected": expected})


def read_fields(kind: Any, data: Mapping[str, object]) -> dict[str, Any]:
    """Arguments for the dataclass `kind` from a JSON object. Lists are converted to tuples, unknown keys are ignored.

    Raises:
        ValueError: a value is missing or not accepted; the message names the key.
    """
    arguments: dict[str, Any] = {}
    for json_key in _json_fields(kind):
        name = json_key.name
        if name not in data:
            if json_key.default is MISSING:
                raise ValueError(f"{name} is missing")
            continue
        value = data[name]
        if not json_key.metadata["check"](value):
            raise ValueError(f"{name} is {str(value)[:_SHOWN]}, expected {json_key.metadata['expected']}")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return arguments


def written_fields(instance: object) -> dict[str, JsonValue]:
    """Inverse of `read_fields`: the JSON object of a dataclass instance."""
    written: dict[str, JsonValue] = {}
    for json_key in _json_fields(instance):
        value = getattr(instance, json_key.name)
        if value != json_key.default:
            written[json_key.name] = list(value) if isinstance(value, tuple) else value
    return written


def _json_fields(kind: Any) -> list[Field[Any]]:
    return [candidate for candidate in fields(kind) if "check" in candidate.metadata]
