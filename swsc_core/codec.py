"""One door to every method: a spec and a weight in, named tensors and a small entry out, and back.

The entry is plain JSON. With it and the tensors `decode` gives the dense weight again; both stand in a compressed
checkpoint (the entry in `quantization_config`). Parts are named after the tensor `X.weight` that they replace:

    swsc: X.weight = centroids [codebooks * k, size]   X.labels   X.scales   X.left [r, m]   X.right [r, n]
    rtn:  X.weight = codes (packed bytes)              X.scales   X.zero_points

Of swsc, `scales` stand there when rows are scaled. Centroids or factors of fewer bits than a floating point value has
are packed codes, and X.weight_scales, or X.left_scales and X.right_scales, stand beside them.

The name `.weight` is kept on purpose: a loader that does not know the format then meets a shape that does not fit
and refuses, instead of filling a layer whose weight is missing with random numbers.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from swsc_core.bits import label_bits
from swsc_core.checks import WeightError, not_finite
from swsc_core.matrix import SwscMatrix, restore
from swsc_core.metric import Metric
from swsc_core.packing import packed_bytes
from swsc_core.rtn import RtnMatrix, dequantize, group_count, group_length, quantize
from swsc_core.spec import Spec, SwscSpec
from swsc_core.swsc import compress
from swsc_core.values import GROUP, Values

PARTS = (
    "weight", "labels", "scales", "left", "right", "weight_scales", "left_scales", "right_scales", "zero_points",
)  # fmt: skip
_ROWS = 256  # rows that are held in float64 at a time


def parts_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parts that a compressed matrix is stored as."""
    return tuple(part_shapes(entry))


def part_shapes(entry: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """part -> (shape, whether it is floating point values; else packed uint8), of a compressed matrix.

    Raises:
        ValueError: the entry does not fit the matrix that it is said of.
    """
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    if entry["method"] == "rtn":
        groups = group_count(shape, group_length(shape, entry["granularity"], entry.get("group_size", 0)))
        codes, zeros = packed_bytes(shape[0] * shape[1], entry["bits"]), packed_bytes(groups, entry["bits"])
        zeros = 0 if entry["symmetric"] else zeros
        return {"weight": ((codes,), False), "scales": ((groups,), True), "zero_points": ((zeros,), False)}
    if entry["method"] != "swsc":
        raise ValueError(f"method {entry['method']!r} is not known")
    spec = _spec_of(shape, entry)
    layout = spec.layout(shape)
    labels = packed_bytes(layout.count, label_bits(spec.n_clusters))
    parts: dict[str, tuple[tuple[int, ...], bool]] = {"labels": ((labels,), False)}
    parts |= {"scales": ((shape[0],), True)} if entry["scaled"] else {}
    centroids = (spec.codebooks * spec.n_clusters, layout.size)
    parts |= _value_shapes("weight", centroids, entry["centroid_bits"])
    parts |= _value_shapes("left", (spec.rank, shape[0]), entry["factor_bits"])
    return parts | _value_shapes("right", (spec.rank, shape[1]), entry["factor_bits"])


def _value_shapes(part: str, shape: tuple[int, int], bits: int | None) -> dict[str, tuple[tuple[int, ...], bool]]:
    if bits is None:
        return {part: (shape, True)}
    count = shape[0] * shape[1]
    groups = group_count((1, count), min(GROUP, count))
    return {part: ((packed_bytes(count, bits),), False), f"{part}_scales": ((groups,), True)}


def _spec_of(shape: tuple[int, int], entry: Mapping[str, Any]) -> SwscSpec:
    kinds = ("n_clusters", "rank", "channel_axis", "segment_size", "codebooks")
    spec = SwscSpec(**{kind: entry[kind] for kind in kinds})
    if wrong := spec.refusal(shape):
        raise ValueError(f"a matrix of {shape[0]}×{shape[1]}: {wrong}")
    return spec


@dataclass(frozen=True)
class Encoded:
    """A compressed matrix as it is stored.

    Attributes:
        tensors: part name ("weight", "labels", …) -> contiguous tensor.
        entry: what `decode` must know beside the tensors; plain JSON.
        restored: the dense weight as a loader will see it, in the weight's own dtype.
        squared_error: ‖W − Ŵ‖²_F, of the weight and what is restored.
        squared_norm: ‖W‖²_F.
        stats: what the method measured: seconds, iterations, the clustering's own error.
    """

    tensors: dict[str, Tensor]
    entry: dict[str, Any]
    restored: Tensor
    squared_error: float
    squared_norm: float
    stats: dict[str, Any] = field(default_factory=dict)

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
    results = [_encode_one(weight, spec, name, seed, storage_dtype, metric) for spec in specs]
    return min(results, key=lambda result: result.stats.get("energy", result.squared_error))


def _encode_one(
    weight: Tensor, spec: Spec, name: str, seed: int, storage_dtype: torch.dtype | None, metric: Metric | None
) -> Encoded:
    entry: dict[str, Any] = {"method": spec.method, "shape": list(weight.shape), "dtype": dtype_name(weight.dtype)}
    if isinstance(spec, SwscSpec):
        matrix, measured = compress(
            weight, spec, metric=metric if spec.metric == "activations" else None,
            seed=seed, storage_dtype=storage_dtype, name=name,
        )  # fmt: skip
        parts = tensors_of(matrix)
        used = matrix.centroids.shape[0] // spec.codebooks
        entry |= {"n_clusters": used, "rank": spec.rank, "channel_axis": spec.channel_axis}
        entry |= {"segment_size": matrix.layout.size, "codebooks": spec.codebooks, "scaled": spec.scaled}
        entry |= {"centroid_bits": matrix.centroids.bits, "factor_bits": matrix.left.bits}
        restored, stats = restore(matrix, weight.dtype), asdict(measured)
    else:
        started = time.perf_counter()
        rtn = quantize(
            weight, spec.bits, granularity=spec.granularity, group_size=spec.group_size,
            symmetric=spec.symmetric, scale_dtype=storage_dtype, name=name,
        )  # fmt: skip
        parts = rtn_tensors_of(rtn)
        entry |= {"bits": rtn.bits, "granularity": spec.granularity, "symmetric": rtn.symmetric}
        entry |= {"group_size": spec.group_size} if spec.granularity == "group" else {}
        restored, stats = dequantize(rtn, weight.dtype), {"rtn_seconds": time.perf_counter() - started}
    return _encoded(name, weight, parts, entry, restored, stats)


def encoded_as(matrix: SwscMatrix, entry: Mapping[str, Any], weight: Tensor, name: str) -> Encoded:
    """A compressed form of `weight` that was made elsewhere, with its errors.

    Raises:
        WeightError: values that overflow.
    """
    return _encoded(name, weight, tensors_of(matrix), dict(entry), restore(matrix, weight.dtype), {})


def _encoded(
    name: str, weight: Tensor, parts: dict[str, Tensor], entry: dict[str, Any], restored: Tensor, stats: dict[str, Any]
) -> Encoded:
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    for tensor in parts.values():
        if tensor.is_floating_point() and not_finite(tensor):
            raise WeightError(f"{name}: values overflow {dtype_name(tensor.dtype)}; choose a wider storage dtype")
    if not_finite(restored):
        raise WeightError(f"{name}: restored values overflow {dtype_name(restored.dtype)}; leave this tensor out")
    return Encoded(parts, entry, restored, *_squares(weight, restored), stats)


def decode(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """The dense weight, in its own dtype, from the stored parts and the entry that `encode` made.

    Raises:
        ValueError: the entry does not fit its matrix, the parts do not fit the entry, or a label is out of range.
    """
    require_parts(tensors, entry)
    dtype = getattr(torch, entry["dtype"])
    if entry["method"] == "rtn":
        return dequantize(rtn_matrix_of(tensors, entry), dtype)
    matrix = matrix_of(tensors, entry)
    matrix.require_labels()
    return restore(matrix, dtype)


def require_parts(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the part, unless `tensors` are parts of the shapes and kinds that `entry` asks for."""
    for part, (shape, is_float) in part_shapes(entry).items():
        tensor = tensors[part]
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != is_float:
            kind = "floating point values" if is_float else "uint8"
            found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"{part} is {found}, wanted {kind} {list(shape)}")


def rtn_matrix_of(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> RtnMatrix:
    """What round-to-nearest stored, of its parts."""
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    length = group_length(shape, entry["granularity"], entry.get("group_size", 0))
    codes, scales, zeros = tensors["weight"], tensors["scales"], tensors["zero_points"]
    return RtnMatrix(shape, entry["bits"], length, entry["symmetric"], codes, scales, zeros)


def rtn_tensors_of(matrix: RtnMatrix) -> dict[str, Tensor]:
    """Inverse of `rtn_matrix_of`: tensors by the names of their parts."""
    return {"weight": matrix.codes, "scales": matrix.scales, "zero_points": matrix.zero_points}


def tensors_of(matrix: SwscMatrix) -> dict[str, Tensor]:
    """The tensors of a compressed matrix by the names of its parts."""
    parts = {"labels": matrix.labels} | ({} if matrix.scales is None else {"scales": matrix.scales})
    for part, values in (("weight", matrix.centroids), ("left", matrix.left), ("right", matrix.right)):
        parts |= {part: values.data} | ({} if values.scales is None else {f"{part}_scales": values.scales})
    return parts


def matrix_of(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> SwscMatrix:
    """Inverse of `tensors_of`.

    Raises:
        ValueError: what the entry says does not fit the matrix that it is said of.
    """
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    layout = _spec_of(shape, entry).layout(shape)

    def values(part: str, rows: int, columns: int, bits: int | None) -> Values:
        return Values((rows, columns), tensors[part], tensors.get(f"{part}_scales"), bits)

    return SwscMatrix(
        layout,
        entry["codebooks"],
        values("weight", entry["codebooks"] * entry["n_clusters"], layout.size, entry["centroid_bits"]),
        tensors["labels"],
        tensors.get("scales"),
        values("left", entry["rank"], shape[0], entry["factor_bits"]),
        values("right", entry["rank"], shape[1], entry["factor_bits"]),
    )


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
