"""Claims about dataclasses that are read from JSON: values are checked, defaults are not written."""

from dataclasses import dataclass
from typing import Any

import pytest

from swsc_core.storage.json_fields import FLAG, integer, integers, json_field, one_of, read_fields, written_fields


@dataclass(frozen=True)
class Example:
    shape: tuple[int, int] = json_field(integers(2, 1), "two positive numbers")
    flag: bool = json_field(FLAG, "true or false", default=False)
    bits: int | None = json_field(one_of(None, 4), "null or 4", default=None)
    not_in_json: str = "x"


def test_values_survive_a_round_trip_and_defaults_are_not_written() -> None:
    example = Example((2, 3), bits=4)
    assert written_fields(example) == {"shape": [2, 3], "bits": 4}
    assert Example(**read_fields(Example, written_fields(example) | {"unknown": 1})) == example


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({}, "shape"),
        ({"shape": [1, 0]}, "shape"),
        ({"shape": [1, True]}, "shape"),
        ({"shape": [1, 2, 3]}, "shape"),
        ({"shape": [1, 2], "flag": 1}, "flag"),
        ({"shape": [1, 2], "bits": 4.0}, "bits"),
    ],
)
def test_a_value_that_is_missing_or_wrong_names_its_key(data: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is"):
        read_fields(Example, data)


def test_a_bool_is_no_integer() -> None:
    assert integer(0)(0)
    assert not integer(0)(False)
