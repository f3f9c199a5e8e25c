"""What the verbs print about their results."""

from jobs.command_line.results import _larger_than_dense
from tests.unit.pipeline.planning.test_plan import plan_of

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.0.self_attn.k_proj.weight": (16, 64)}


def test_a_plan_warns_of_matrices_that_grow() -> None:
    warning = _larger_than_dense(plan_of(SHAPES, rank=14))  # 14 · (16 + 64) values in place of 16 · 64
    assert "1 of 2" in warning
    assert "k_proj" in warning
    assert "instead of 16" in warning
    assert _larger_than_dense(plan_of(SHAPES, rank=4)) == ""
