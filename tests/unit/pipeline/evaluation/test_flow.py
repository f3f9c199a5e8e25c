"""How windows are divided into tasks."""

import numpy as np
import pytest

from pipeline.evaluation.flow import batch_parts
from pipeline.settings.evaluation import EvaluateSettings


@pytest.mark.parametrize("count", [1, 7, 16, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_parts_cover_all_windows_in_order_and_split_no_batch(count: int, batch_size: int) -> None:
    ids = np.arange(count)[:, None]
    parts = batch_parts(ids, EvaluateSettings(text="text", batch_size=batch_size))
    assert np.array_equal(np.concatenate([part for _, part in parts]), ids)
    assert [int(part[0, 0]) for _, part in parts] == [start for start, _ in parts]
    assert all(start % batch_size == 0 for start, _ in parts)
