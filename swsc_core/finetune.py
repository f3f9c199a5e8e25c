"""Fine-tuning of the stored values of a compressed matrix.

With fixed labels, a compressed matrix Ŵ = s ∘ C[labels] + leftᵀ · right is differentiable in the centroids C, the
scales s and the factors. The gradient of a loss with respect to Ŵ therefore determines the gradients with respect to
the stored values; that of a centroid is the sum over all segments with its label. AQLM (Egiazarian et al. 2024)
fine-tunes codebooks in this way.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from swsc_core.method.pairwise import sum_by_label
from swsc_core.method.stored_values import StoredValues, store_scales, store_values
from swsc_core.method.swsc_matrix import SwscMatrix
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import unpack

# Decay rates of Adam's running means of gradients and of their squares.
_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.95
# Keeps divisors from being zero.
_TINY = 1e-12


class Tunable:
    """A compressed matrix with unpacked labels, as a function of its stored values.

    The values are float32 tensors under the names "centroids" [codebooks * k, size], "scales" [m], "left" [r, m] and
    "right" [r, n]. Values that the matrix does not store are absent.
    """

    def __init__(self, matrix: SwscMatrix) -> None:
        self.matrix = matrix
        layout, count = matrix.layout, matrix.centroids.shape[0]
        k = count // matrix.codebooks
        if k:
            labels = unpack(matrix.labels, label_bits(k), layout.count).reshape(matrix.codebooks, -1)
            first = torch.arange(0, count, k, dtype=labels.dtype, device=labels.device)
            self._indices = (labels + first[:, None]).reshape(-1)

    def stored(self, values: Mapping[str, Tensor]) -> SwscMatrix:
        """The matrix with other values, stored in the same dtypes and bits."""
        matrix = self.matrix
        scales = None if matrix.scales is None else store_scales(values["scales"], matrix.scales.dtype)
        centroids = _stored_like(matrix.centroids, values.get("centroids"))
        left, right = _stored_like(matrix.left, values.get("left")), _stored_like(matrix.right, values.get("right"))
        return replace(matrix, scales=scales, centroids=centroids, left=left, right=right)

    def rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`values` rounded as they will be stored.

        The loss is computed for rounded values, and its gradient is applied to unrounded ones (straight-through
        estimator).
        """
        return tunable_values(self.stored(values))

    def restored(self, values: Mapping[str, Tensor]) -> Tensor:
        """Ŵ, float32 [m, n]."""
        layout = self.matrix.layout
        restored = self._unscaled(values) if "centroids" in values else values["left"].new_zeros(layout.m, layout.n)
        if "scales" in values:
            restored = restored * values["scales"][:, None]
        return restored + values["left"].T @ values["right"] if "left" in values else restored

    def gradients(self, values: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of a loss with respect to `values`, by name.

        Args:
            values: where the gradients are taken.
            gradient: of the loss with respect to Ŵ, [m, n].
        """
        gradients: dict[str, Tensor] = {}
        if "left" in values:
            gradients |= {"left": values["right"] @ gradient.T, "right": values["left"] @ gradient}
        if "scales" in values:
            gradients["scales"] = (gradient * self._unscaled(values)).sum(dim=1)
            gradient = gradient * values["scales"][:, None]
        if "centroids" in values:
            segments = self.matrix.layout.segments(gradient)
            gradients["centroids"] = sum_by_label(segments, self._indices.long(), len(values["centroids"]))
        return gradients

    def _unscaled(self, values: Mapping[str, Tensor]) -> Tensor:
        """The centroid of each segment, [m, n], before rows are scaled."""
        return self.matrix.layout.matrix(values["centroids"][self._indices])


def tunable_values(matrix: SwscMatrix) -> dict[str, Tensor]:
    """The stored values of a matrix, float32 copies under the names of `Tunable`."""
    values = {"centroids": matrix.centroids.expand(), "left": matrix.left.expand(), "right": matrix.right.expand()}
    if matrix.scales is not None:
        values["scales"] = matrix.scales.float()
    return {name: value.clone() for name, value in values.items() if value.numel()}


def _stored_like(previous: StoredValues, values: Tensor | None) -> StoredValues:
    """`values` in the dtype and bits of `previous`; None: `previous` itself."""
    if values is None:
        return previous
    return store_values(values, previous.bits, (previous.data if previous.scales is None else previous.scales).dtype)


def step_unit(name: str, value: Tensor) -> Tensor:
    """Unit of the step size of each value, positive: the absolute value of a scale, else the RMS of all values."""
    size = value.abs() if name == "scales" else value.square().mean().sqrt().expand_as(value)
    return size.clamp(min=_TINY)


class AdamState(NamedTuple):
    """A value and Adam's running means of its gradient and of the gradient's square, float32 tensors of one shape."""

    value: Tensor
    mean: Tensor
    square: Tensor


def adam_step(state: AdamState, gradient: Tensor, unit: Tensor, step: int, rate: float) -> AdamState:
    """One step of Adam (Kingma and Ba 2015, algorithm 1) on a value that is measured in multiples of `unit`.

    Args:
        state: the value and its running means; zeros before the first step.
        gradient: derivative of the loss with respect to the value.
        unit: size of the value, as `step_unit` returns it.
        step: number of the step, counted from 1.
        rate: step size, in multiples of `unit`.
    """
    gradient = gradient * unit
    mean = _MEAN_DECAY * state.mean + (1 - _MEAN_DECAY) * gradient
    square = _SQUARE_DECAY * state.square + (1 - _SQUARE_DECAY) * gradient.square()
    unbiased_mean = mean / (1 - _MEAN_DECAY**step)
    deviation = (square / (1 - _SQUARE_DECAY**step)).sqrt()
    return AdamState(state.value - rate * unit * unbiased_mean / (deviation + _TINY), mean, square)
