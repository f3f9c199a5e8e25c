"""Claims about the stages of a compression."""

import pytest

from pipeline.device import Arithmetic
from pipeline.variants import compress
from tests.unit.pipeline.planning.test_plan import plan_of


@pytest.mark.parametrize(
    ("device", "beside", "separately"),
    [("cpu", 0, False), ("NVIDIA H200", 0, True), ("NVIDIA H200", 16 << 30, False)],
)
def test_many_bytes_are_copied_without_occupying_a_gpu(
    device: str, beside: int, separately: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "_COPIED_BESIDE", beside)
    assert compress._are_copied_separately(plan_of(), Arithmetic(1, device)) is separately
