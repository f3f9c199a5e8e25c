"""The stored values of a compressed matrix as parameters of a loss.

With its labels standing a compressed matrix Ŵ = s ∘ C[labels] + leftᵀ · right is differentiable in the centroids C, the
scales s and the factors. A loss that knows its gradient by Ŵ therefore knows it by what is stored: for a centroid the
sum over all segments that share it. (Fine-tuning of codebooks: AQLM, Egiazarian et al. 2024; AdamW-style steps: Kingma
and Ba 2015.)
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
_TINY = 1e-12


class Tunable:
    """One compressed matrix, its labels unpacked.

    Values go by the names "centroids" [codebooks * k, size], "scales" [m], "left" [r, m] and "right" [r, n], all float32;
    those that the matrix does not have are absent.
    """

    def __init__(self, matrix: SwscMatrix) -> None:
        self.matrix = matrix
        layout, count = matrix.layout, matrix.centroids.shape[0]
        k = count // matrix.codebooks
        if k:
            labels = unpack(matrix.labels, label_bits(k), layout.count).reshape(matrix.codebooks, -1)
            first = torch.arange(0, count, k, dtype=labels.dtype, device=labels.device)
            self._places = (labels + first[:, None]).reshape(-1)

    def stored(self, values: Mapping[str, Tensor]) -> SwscMatrix:
        """The matrix with `values` in place of its own, in the same dtypes and bits."""
        own = self.matrix
        scales = None if own.scales is None else store_scales(values["scales"], own.scales.dtype)
        centroids, left, right = (
            _stored_like(stored, values.get(name))
            for name, stored in (("centroids", own.centroids), ("left", own.left), ("right", own.right))
        )
        return replace(own, scales=scales, centroids=centroids, left=left, right=right)

    def rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`values` as they are once stored. A loss is taken there, and its gradient as if nothing had been rounded."""
        return tunable_values(self.stored(values))

    def restored(self, values: Mapping[str, Tensor]) -> Tensor:
        """Ŵ in float32, [m, n]."""
        layout = self.matrix.layout
        dense = self._spread(values) if "centroids" in values else values["left"].new_zeros(layout.m, layout.n)
        if "scales" in values:
            dense = dense * values["scales"][:, None]
        return dense + values["left"].T @ values["right"] if "left" in values else dense

    def gradients(self, values: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """The gradient of a loss by each of `values`, given the one by Ŵ [m, n]."""
        found: dict[str, Tensor] = {}
        if "left" in values:
            found |= {"left": values["right"] @ gradient.T, "right": values["left"] @ gradient}
        if "scales" in values:
            found["scales"] = (gradient * self._spread(values)).sum(dim=1)
            gradient = gradient * values["scales"][:, None]
        if "centroids" in values:
            segments = self.matrix.layout.segments(gradient)
            found["centroids"] = sum_by_label(segments, self._places.long(), len(values["centroids"]))
        return found

    def _spread(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.matrix.layout.matrix(values["centroids"][self._places])


def tunable_values(matrix: SwscMatrix) -> dict[str, Tensor]:
    """What a matrix stores, in float32."""
    found = {"centroids": matrix.centroids.expand(), "left": matrix.left.expand(), "right": matrix.right.expand()}
    if matrix.scales is not None:
        found["scales"] = matrix.scales.float()
    return {name: value.clone() for name, value in found.items() if value.numel()}


def _stored_like(before: StoredValues, values: Tensor | None) -> StoredValues:
    if values is None:
        return before
    return store_values(values, before.bits, (before.data if before.scales is None else before.scales).dtype)


def step_unit(name: str, value: Tensor) -> Tensor:
    """What counts as one for a step: a scale's own size, or the RMS of all values of a part; never zero."""
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
