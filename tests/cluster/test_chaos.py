"""A short form of benchmarks/chaos.py: real kills of everything, and the bytes of a run that nobody disturbed."""

import pytest

from benchmarks.chaos import set_up

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_run_that_is_struck_again_and_again_ends_as_if_nothing_had_happened() -> None:
    with set_up() as place:
        place.measure_undisturbed()
        outcome = place.run("0 1", strikes=3)
    assert outcome.strikes
    assert outcome.identical
    assert outcome.lost == 0
