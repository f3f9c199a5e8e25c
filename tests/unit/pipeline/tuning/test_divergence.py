"""KL divergence and its gradient, against autograd."""

import pytest
import torch

from pipeline.errors import CheckpointError, NonFiniteLoss
from pipeline.tuning.divergence import backward_from_divergence, divergence


def logits(seed: int) -> torch.Tensor:
    """More positions than are compared at a time."""
    return torch.randn(600, 7, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_sum_over_positions_and_zero_for_equal_predictions() -> None:
    teacher, student = logits(0), logits(1)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    assert divergence(teacher, student, "") == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)
    assert divergence(teacher, teacher + 3, "") == pytest.approx(0, abs=1e-3)


def test_its_gradient_is_that_of_autograd() -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    expected = logits(1).requires_grad_()
    p, q = teacher.log_softmax(-1), expected.log_softmax(-1)
    (p.exp() * (p - q)).sum().backward()
    total = backward_from_divergence(teacher, student, "")
    assert total == divergence(teacher, student, "")
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_predictions_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteLoss, match=r"model: .*--calibration-dtype"):
        divergence(logits(0), logits(1) * torch.inf, "model")


def test_logits_that_depend_on_no_value_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model: no token .*--tune"):
        backward_from_divergence(logits(0), logits(1), "model")
