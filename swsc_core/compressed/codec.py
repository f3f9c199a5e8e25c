"""Encode and decode by any method: a spec and a weight in, named tensors and an entry out, and back.

A compressed checkpoint holds both: the tensors in its files, the entry in `quantization_config`. Parts are named after the
tensor `X.weight` that they replace: `X.weight` itself, `X.labels`, `X.scales` and so on (docs/format.md).

The name `.weight` is kept on purpose: a loader that does not know the format then meets a shape that does not fit
and refuses, instead of filling a layer whose weight is missing with random numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, not_finite
from swsc_core.compressed.compressed_matrix import CompressedMatrix, CompressOptions
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import matrix_of, method_named
from swsc_core.method.metric import Metric
from swsc_core.method.spec import Spec

_ROWS = 256  # rows that are held in float64 at a time


@dataclass(frozen=True)
class Encoded:
    """A compressed matrix as it is stored.

    Attributes:
        tensors: part name ("weight", "labels", …) -> contiguous tensor.
        entry: what `decode` must know beside the tensors; `entry.to_json()` is what config.json states.
        restored: the dense weight as a loader will see it, in the weight's own dtype.
        squared_error: ‖W − Ŵ‖²_F, of the weight and what is restored.
        squared_norm: ‖W‖²_F.
        stats: what the method measured: seconds, iterations, the clustering's own error.
        spec: the one of smallest error among those that `encode` was given; None for a matrix that it did not compress.
    """

    tensors: dict[str, Tensor]
    entry: Entry
    restored: Tensor
    squared_error: float
    squared_norm: float
    stats: dict[str, Any] = field(default_factory=dict)
    spec: Spec | None = None

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖²_F / ‖W‖²_F; 0 for a zero matrix that is restored exactly."""
        if self.squared_norm:
            return self.squared_error / self.squared_norm
        return 0.0 if self.squared_error == 0 else math.inf

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def encode(
    weight: Tensor,
    specs: Sequence[Spec],
    *,
    name: str = "weight",
    seed: int = 0,
    storage_dtype: torch.dtype | None = None,
    metric: Metric | None = None,
) -> Encoded:
    """Compress `weight` [m, n] by each of `specs` and keep the result of smallest error (the first, if equal).

    More than one spec is how the axis "auto" is asked for: one spec an axis, at equal true bits. The error is that of
    the weights, or, for specs of metric "activations", the energy in `metric`.

    Raises:
        ValueError: from the method, naming the tensor.
    """
    options = CompressOptions(name, seed, storage_dtype, metric)
    results = []
    for spec in specs:
        matrix, stats = method_named(spec.method).compress(weight, spec, options)
        results.append(_encoded(matrix, weight, name, stats, spec))
    return min(results, key=lambda result: result.stats.get("energy", result.squared_error))


def encoded_as(matrix: CompressedMatrix, weight: Tensor, name: str) -> Encoded:
    """A compressed form of `weight` that was calculated elsewhere, with its errors.

    Raises:
        InvalidWeightError: values that overflow.
    """
    return _encoded(matrix, weight, name, {})


def _encoded(
    matrix: CompressedMatrix, weight: Tensor, name: str, stats: dict[str, Any], spec: Spec | None = None
) -> Encoded:
    parts = {part: tensor.contiguous() for part, tensor in matrix.tensors.items()}
    for tensor in parts.values():
        if tensor.is_floating_point() and not_finite(tensor):
            raise InvalidWeightError(
                f"{name}: values overflow {dtype_name(tensor.dtype)}; choose a wider storage dtype"
            )
    restored = matrix.restore()
    if not_finite(restored):
        raise InvalidWeightError(
            f"{name}: restored values overflow {dtype_name(restored.dtype)}; leave this tensor out"
        )
    return Encoded(parts, matrix.entry, restored, *_squares(weight, restored), stats, spec)


def decode(tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """The dense weight, in its own dtype, from the stored parts and the entry of `encode`.

    Raises:
        ValueError: the parts do not fit the entry, or a label is out of range.
    """
    return checked_matrix_of(tensors, entry).restore()


def checked_matrix_of(tensors: Mapping[str, Tensor], entry: Entry) -> CompressedMatrix:
    """The compressed matrix of stored parts.

    Raises:
        ValueError: the parts do not fit the entry, or a label is out of range.
    """
    require_parts(tensors, entry)
    matrix = matrix_of(tensors, entry)
    matrix.require_valid()
    return matrix


def require_parts(tensors: Mapping[str, Tensor], entry: Entry) -> None:
    """Raise ValueError, naming the part, unless `tensors` are parts of the shapes and kinds that `entry` asks for."""
    for part, (shape, is_float) in entry.part_shapes().items():
        tensor = tensors[part]
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != is_float:
            kind = "floating point values" if is_float else "uint8"
            found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"{part} is {found}, wanted {kind} {list(shape)}")


def _squares(weight: Tensor, restored: Tensor) -> tuple[float, float]:
    """‖W − Ŵ‖²_F and ‖W‖²_F, in float64, some rows at a time."""
    error = norm = 0.0
    for before, after in zip(weight.split(_ROWS), restored.split(_ROWS), strict=True):
        dense = before.float().double()
        error += float((dense - after.float().double()).square_().sum())
        norm += float(dense.square_().sum())
    return error, norm


def dtype_name(dtype: torch.dtype) -> str:
    """Name as it stands in `torch`: "bfloat16", "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")
