"""KL(p ‖ q) in nats per token, with the prediction p of the original model and q of the compressed model.

Its gradient with respect to the logits of q is q − p.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, NonFiniteLoss

# Positions whose predictions are compared at a time, which bounds the float32 copies of logits.
_POSITIONS = 512


def divergence(teacher: Tensor, student: Tensor, location: str, gradient: Tensor | None = None) -> float:
    """Sum of KL(p ‖ q) over the tokens of one window.

    Args:
        teacher, student: logits of p and q, [seqlen, vocabulary].
        location: of the compressed model, for messages.
        gradient: receives the derivative with respect to the logits of q, if given.

    Raises:
        NonFiniteLoss: it is NaN or Inf.
    """
    total = 0.0
    for start in range(0, len(teacher), _POSITIONS):
        rows = slice(start, start + _POSITIONS)
        p, q = (logits[rows].detach().float().log_softmax(dim=-1) for logits in (teacher, student))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        if gradient is not None:
            gradient[rows] = q.exp_().sub_(p.exp())
    if not np.isfinite(total):
        raise NonFiniteLoss(
            f"{location}: the predictions are NaN or Inf; choose a wider dtype with --calibration-dtype"
        )
    return total


def backward_from_divergence(teacher: Tensor, student: Tensor, location: str) -> float:
    """`divergence`, and the backward pass from it.

    Raises:
        CheckpointError: the logits of q depend on no parameter with a gradient.
    """
    gradient = torch.empty_like(student)
    total = divergence(teacher, student, location, gradient)
    if not student.requires_grad:
        raise CheckpointError(
            f"{location}: no token reaches any of the compressed matrices, so they cannot be tuned; drop --tune, or"
            " select other matrices"
        )
    student.backward(gradient)
    return total
