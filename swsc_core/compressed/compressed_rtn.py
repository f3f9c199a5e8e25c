"""Method "rtn": rounding to nearest, the paper's baseline (section IV-A).

Stored tensors: weight (packed codes), scales and zero_points.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix, CompressOptions, Range
from swsc_core.compressed.entry import RtnEntry
from swsc_core.compressed.rtn_slicing import rtn_columns, rtn_rows
from swsc_core.method.rtn import RtnMatrix, dequantize, group_length, quantize_groups, require_quantizable
from swsc_core.method.spec import RtnSpec


@dataclass(frozen=True)
class CompressedRtn(CompressedMatrix):
    """An `RtnMatrix` and its entry."""

    spec_type = RtnSpec
    entry_type = RtnEntry
    part_names = ("weight", "scales", "zero_points")
    entry: RtnEntry
    matrix: RtnMatrix

    @classmethod
    def compress(
        cls, weight: Tensor, spec: RtnSpec, options: CompressOptions
    ) -> tuple["CompressedRtn", dict[str, float]]:
        started = time.perf_counter()
        require_quantizable(options.name, weight, spec.bits, spec.group_size)
        length = group_length((weight.shape[0], weight.shape[1]), spec.granularity, spec.group_size)
        matrix = quantize_groups(weight, spec.bits, length, spec.symmetric, options.storage_dtype)
        entry = RtnEntry(
            shape=matrix.shape,
            dtype=str(weight.dtype).removeprefix("torch."),
            bits=spec.bits,
            granularity=spec.granularity,
            symmetric=spec.symmetric,
            group_size=spec.group_size if spec.granularity == "group" else None,
        )
        return cls(entry, matrix), {"rtn_seconds": time.perf_counter() - started}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: RtnEntry) -> "CompressedRtn":
        codes, scales, zeros = tensors["weight"], tensors["scales"], tensors["zero_points"]
        length = entry.group_length
        return cls(entry, RtnMatrix(entry.shape, entry.bits, length, entry.symmetric, codes, scales, zeros))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.matrix.codes, "scales": self.matrix.scales, "zero_points": self.matrix.zero_points}

    def restore(self) -> Tensor:
        return dequantize(self.matrix, self.entry.torch_dtype)

    def slice(self, rows: Range, columns: Range) -> "CompressedRtn":
        matrix = rtn_columns(rtn_rows(self.matrix, *rows), *columns)
        size = matrix.group_size if self.entry.granularity == "group" else None
        location = type(self.entry.location)()
        return CompressedRtn(replace(self.entry, shape=matrix.shape, group_size=size, location=location), matrix)
