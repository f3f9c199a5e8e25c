"""Perplexity of window losses."""

import math

import pytest

from pipeline.errors import NonFiniteLoss
from pipeline.evaluation.perplexity import perplexity


def test_perplexity_is_exp_of_the_mean_over_windows() -> None:
    assert perplexity([1.0, 2.0, 6.0], "model") == pytest.approx(math.exp(3.0))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_window_without_a_finite_loss_is_named(loss: float) -> None:
    with pytest.raises(NonFiniteLoss, match=r"model.*window 1"):
        perplexity([1.0, loss], "model")
