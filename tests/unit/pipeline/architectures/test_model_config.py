"""Numbers of config.json are found under every family's alias, in the language part first."""

from typing import Any

import pytest

from pipeline.architectures.model_config import ALIASES, find_number, max_positions, number_of, text_config, text_part

NAMES = [(key, name) for key, others in ALIASES.items() for name in (key, *others)]


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_every_alias_gives_the_number(key: str, name: str) -> None:
    assert find_number({name: 12}, key) == number_of({name: 12}, key) == 12


def test_no_name_stands_for_two_numbers() -> None:
    names = [name for _, name in NAMES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 8, "text_config": {"hidden_size": 4}}, 4),
        ({"hidden_size": 8, "text_config": {"n_embd": 4}}, 4),
        ({"hidden_size": 8, "text_config": {}}, 8),
        ({"hidden_size": 8, "text_config": None}, 8),
        ({"hidden_size": None, "n_embd": 4}, 4),
    ],
)
def test_the_language_part_comes_first_under_any_of_its_names(config: dict[str, Any], expected: int) -> None:
    assert find_number(config, "hidden_size") == expected


@pytest.mark.parametrize("value", [0, -1, "64", 64.0, None, [64]])
def test_what_is_no_positive_integer_does_not_count(value: object) -> None:
    assert find_number({"hidden_size": value}, "hidden_size") is None
    with pytest.raises(ValueError, match="hidden_size or n_embed or n_embd"):
        number_of({"hidden_size": value}, "hidden_size")


def test_the_text_config_overrides_the_outer_level_and_leaves_the_rest() -> None:
    config = {"a": 1, "b": 1, "text_config": {"b": 2}}
    assert text_part(config) == {"b": 2}
    assert {key: text_config(config)[key] for key in "ab"} == {"a": 1, "b": 2}


def test_positions_of_a_multimodal_model_are_those_of_its_text_part() -> None:
    assert max_positions({"max_position_embeddings": 9, "text_config": {"n_positions": 4}}) == 4
    assert max_positions({}) is None
