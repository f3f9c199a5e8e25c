"""What a worker has made of a layer: the tensors of its file, and the rows of the report."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.model.matrices import Joined, location_of, rows_of, tensor_of
from pipeline.model.parts import Part, to_part
from pipeline.model.tensors import TensorInfo, View
from pipeline.run.heap import peak_rss
from swsc_core import Encoded
from swsc_core.codec import dtype_name
from swsc_core.format import part_name
from swsc_core.row_blocks import fuse_rows, remaining_rows
from swsc_core.safetensors_header import DTYPES
from swsc_core.spec import Spec


class LayerParts:
    """The stored tensors of one layer, matrix by matrix, then what is left of tensors that join several."""

    def __init__(self, form: str) -> None:
        """`form`: "swsc", or "dense" for restored weights as they lay in the source."""
        self._form = form
        self._parts: list[Part] = []
        self._restored: dict[str, list[Tensor]] = {}  # joined tensor -> its pieces, in the dense form

    def add(self, info: TensorInfo, encoded: Encoded) -> None:
        """A matrix that is compressed."""
        rows = rows_of(info.view) if info.view else None
        if self._form == "swsc":
            self._parts += [to_part(part_name(info.name, part), own) for part, own in encoded.tensors.items()]
        elif rows is None:
            self._parts.append(to_part(info.name, location_of(info).to_checkpoint_layout(encoded.restored)))
        else:
            self._restored.setdefault(tensor_of(info), []).append(encoded.restored.cpu())

    def add_rest(self, joined: Joined, read: Callable[[View], Tensor]) -> None:
        """What is left of a joined matrix, which `read` reads, when all its pieces are added; in the dense form the whole."""
        rest = _rest(joined, read)
        if self._form == "dense":
            fused = fuse_rows(rest, joined.rows, self._restored.pop(joined.tensor))
            rest = location_of(joined.pieces[0]).to_checkpoint_layout(fused)
        self._parts.append(to_part(joined.tensor, rest))

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them."""
        return tuple(self._parts)


def _rest(joined: Joined, read: Callable[[View], Tensor]) -> Tensor:
    """The rows [rest, n] of a joined matrix that are in none of its pieces, on the CPU; only what holds some is read."""
    (m, n), slices = joined.shape, joined.slices
    left, each = remaining_rows(m, joined.rows), m // len(joined.slices)
    found = [torch.empty(0, n, dtype=getattr(torch, DTYPES[joined.pieces[0].dtype][0]))]
    for number, view in enumerate(slices):
        own = left[(left >= each * number) & (left < each * (number + 1))] - each * number
        if len(own):
            found.append(read(view)[own])
    return torch.cat(found)


def row_of(
    info: TensorInfo, specs: tuple[Spec, ...], encoded: Encoded, read_seconds: float, seconds: float
) -> dict[str, Any]:
    """A row of swsc_report.json; bits are counted from the bytes that are stored."""
    axis = encoded.entry.get("channel_axis")
    spec = next(spec for spec in specs if getattr(spec, "channel_axis", None) == axis)
    cluster_error = encoded.stats.get("cluster_error")
    return {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": dtype_name(encoded.restored.dtype),
        "method": spec.method,
        "bits_per_weight": 8 * encoded.stored_bytes / info.count,
        "paper_bits": spec.paper_bits((info.shape[0], info.shape[1])),
        **errors_of(info, encoded),
        "cluster_mean_squared_error": None if cluster_error is None else cluster_error / info.count,
        "read_seconds": read_seconds,
        "seconds": seconds,
        "stored_bytes": encoded.stored_bytes,
        "entry": encoded.entry | location_of(info).to_json(),
        "stats": encoded.stats,
    }


def errors_of(info: TensorInfo, encoded: Encoded) -> dict[str, float]:
    """What a compression lost of a matrix."""
    return {
        "relative_error": encoded.relative_error,
        "mean_squared_error": encoded.squared_error / info.count,
        "mean_square": encoded.squared_norm / info.count,
    }


def measured(rows: list[dict[str, Any]], kernels: str) -> dict[str, Any]:
    """What a worker says of a finished layer; `kernels`: vector instructions of its CPU, or its GPU."""
    return {"rows": rows, "peak_rss": peak_rss(), "kernels": kernels}
