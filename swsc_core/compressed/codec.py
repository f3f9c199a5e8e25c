"""Encoding and decoding by any method: from a weight and a spec to named tensors and an entry, and back.

A compressed checkpoint stores both: the tensors in its files, the entry in `quantization_config`. Stored tensors
("parts") are named after the tensor `X.weight` that they replace: `X.weight` itself, `X.labels`, `X.scales` and so on
(docs/format.md).

One part keeps the name `X.weight` on purpose. A loader that does not know the format then finds a shape that does not
match and refuses the file, instead of initializing a layer without a weight randomly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, count_nonfinite
from swsc_core.compressed.compressed_matrix import WEIGHTED_ERROR, CompressedMatrix, CompressOptions
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import matrix_of, method_named
from swsc_core.method.metric import Metric
from swsc_core.method.spec import Spec

# Rows that are converted to float64 at a time.
_ROWS = 256


@dataclass(frozen=True)
class Encoded:
    """A compressed matrix as it is stored.

    Attributes:
        tensors: part name ("weight", "labels", …) -> contiguous tensor.
        entry: what `decode` needs beside the tensors; config.json holds `entry.to_json()`.
        restored: the dense weight Ŵ that a loader restores, [m, n] in the dtype of the weight.
        squared_error: ‖W − Ŵ‖²_F.
        squared_norm: ‖W‖²_F.
        stats: measurements of the method, by their keys in reports: seconds, rounds, weighted errors.
        spec: the spec of smallest error among those given to `encode`; None for a result of `encoded_as`.
    """

    tensors: dict[str, Tensor]
    entry: Entry
    restored: Tensor
    squared_error: float
    squared_norm: float
    stats: dict[str, float] = field(default_factory=dict)
    spec: Spec | None = None

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖²_F / ‖W‖²_F; 0 for a zero matrix that is restored exactly."""
        if self.squared_norm:
            return self.squared_error / self.squared_norm
        return 0.0 if self.squared_error == 0 else math.inf

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def encode(
    weight: Tensor,
    specs: Sequence[Spec],
    *,
    name: str = "weight",
    seed: int = 0,
    storage_dtype: torch.dtype | None = None,
    metric: Metric | None = None,
) -> Encoded:
    """Compress a weight by each of several specs and return the result of smallest error, the first of equal ones.

    Channel axis "auto" passes one spec per axis, at equal true bits. The error is the method's weighted error if it
    measures one, else the squared error of the restored weight.

    Args:
        weight: floating point [m, n]; not changed.
        specs: at least one.
        name: of the tensor; part of its seed, and named in errors.
        seed: of the run.
        storage_dtype: of stored values; None for the dtype of the weight.
        metric: cost of an error, for specs of metric "activations".

    Raises:
        ValueError: raised by the method, naming the tensor.
    """
    options = CompressOptions(name, seed, storage_dtype, metric)
    results = []
    for spec in specs:
        matrix, stats = method_named(spec.method).compress(weight, spec, options)
        results.append(_checked_encoding(matrix, weight, name, stats, spec))
    return min(results, key=lambda result: result.stats.get(WEIGHTED_ERROR, result.squared_error))


def encoded_as(matrix: CompressedMatrix, weight: Tensor, name: str) -> Encoded:
    """The result of `encode` for a compressed form of `weight` that exists already, with its errors.

    Raises:
        InvalidWeightError: stored or restored values overflow.
    """
    return _checked_encoding(matrix, weight, name, {})


def _checked_encoding(
    matrix: CompressedMatrix, weight: Tensor, name: str, stats: dict[str, float], spec: Spec | None = None
) -> Encoded:
    parts = {part: tensor.contiguous() for part, tensor in matrix.tensors.items()}
    for tensor in parts.values():
        if tensor.is_floating_point() and count_nonfinite(tensor):
            raise InvalidWeightError(
                f"{name}: values overflow {dtype_name(tensor.dtype)}; choose a wider storage dtype"
            )
    restored = matrix.restore()
    if count_nonfinite(restored):
        raise InvalidWeightError(f"{name}: restored values overflow {dtype_name(restored.dtype)}; exclude this tensor")
    return Encoded(parts, matrix.entry, restored, *_squares(weight, restored), stats, spec)


def decode(tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """The dense weight [m, n], in its original dtype, from the stored parts and the entry of `encode`.

    Raises:
        ValueError: the parts do not fit the entry, or a label is out of range.
    """
    return checked_matrix_of(tensors, entry).restore()


def checked_matrix_of(tensors: Mapping[str, Tensor], entry: Entry) -> CompressedMatrix:
    """The compressed matrix of stored parts.

    Raises:
        ValueError: the parts do not fit the entry, or a label is out of range.
    """
    require_part_shapes(tensors, entry)
    matrix = matrix_of(tensors, entry)
    matrix.require_valid()
    return matrix


def require_part_shapes(tensors: Mapping[str, Tensor], entry: Entry) -> None:
    """Raise ValueError, naming the part, unless `tensors` have the shapes and kinds of `entry.part_shapes()`."""
    for part, (shape, is_float) in entry.part_shapes().items():
        tensor = tensors[part]
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != is_float:
            kind = "floating point values" if is_float else "uint8"
            raise ValueError(
                f"{part} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, expected {kind} {list(shape)}"
            )


def _squares(weight: Tensor, restored: Tensor) -> tuple[float, float]:
    """‖W − Ŵ‖²_F and ‖W‖²_F, in float64, some rows at a time."""
    error = norm = 0.0
    for rows, restored_rows in zip(torch.split(weight, _ROWS), torch.split(restored, _ROWS), strict=True):
        dense = rows.float().double()
        error += float((dense - restored_rows.float().double()).square_().sum())
        norm += float(dense.square_().sum())
    return error, norm


def dtype_name(dtype: torch.dtype) -> str:
    """Name of the dtype in `torch`, such as "bfloat16" or "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")
