"""Settings that apply to one method only are listed by the spec class of that method."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.settings.matrix import MatrixSettings


def settings(**given: Any) -> MatrixSettings:
    return MatrixSettings.model_validate(given)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [("rtn", "clusters", 4), ("rtn", "tune", 1), ("rtn", "bits_over", "model"), ("swsc", "symmetric", True)],
)
def test_a_setting_of_another_method_is_refused(method: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{field}: .*method {method}"):
        settings(method=method, **{field: value})


@pytest.mark.parametrize("bits", [1, 2.5, 9])
def test_round_to_nearest_has_codes_of_two_to_eight_bits(bits: float) -> None:
    settings(bits=bits)
    with pytest.raises(ValidationError, match="bits: "):
        settings(method="rtn", bits=bits)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ValidationError) as error:
        settings(clusters=4, bits=3, n_init=2, codebooks=2, factor_bits=4)
    assert all(f"{name}: " in str(error.value) for name in ("bits", "n_init", "factor_bits"))
