"""All that `python -m benchmarks.gpu` claims of a GPU, as tests; skipped without one."""

import pytest
import torch

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.finding import Bench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_its_claims_hold(part: object) -> None:
    found = list(part(Bench("cuda", False)))  # type: ignore[operator]
    assert not [one for one in found if one.ok is False]
