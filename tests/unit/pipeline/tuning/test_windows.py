"""Batches and held-out windows of a tuning."""

from collections import Counter

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.tuning.windows import TuningWindows


def windows(count: int, seqlen: int, epochs: int = 1) -> TuningWindows:
    return TuningWindows(np.arange(count)[:, None].repeat(seqlen, axis=1), epochs, seed=0)


def test_held_out_windows_are_never_trained_on() -> None:
    tuning = windows(16, 512)
    assert list(tuning.held_out) == [14, 15]
    assert set(tuning.held_out).isdisjoint(np.concatenate(tuning.batches()))


def test_each_window_is_used_once_per_epoch() -> None:
    uses = Counter(window for batch in windows(16, 1024, epochs=3).batches() for window in batch)
    assert uses == Counter(dict.fromkeys(range(14), 3))


def test_a_step_has_at_least_one_window_and_the_seed_fixes_the_order() -> None:
    tuning = windows(4, 4096)
    assert [len(batch) for batch in tuning.batches()] == [1, 1, 1]
    assert tuning.batches() == windows(4, 4096).batches()


def test_one_window_cannot_be_trained_on_and_held_out() -> None:
    with pytest.raises(ConfigError, match="calibration-windows"):
        windows(1, 64)
