"""Method "swsc": K-Means over channels or vector quantization of segments, plus a low-rank compensation.

Stored tensors: weight (centroids [codebooks * k, size]), labels, scales (for scaled rows), left [r, m] and right [r,
n]. Centroids and factors of few bits are stored as packed codes, with their scales in weight_scales, left_scales and
right_scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix, CompressOptions, Range
from swsc_core.compressed.entry import Entry, SwscEntry
from swsc_core.compressed.fusing import can_fuse, fuse
from swsc_core.compressed.matmul import swsc_matmul
from swsc_core.compressed.slicing import slice_columns, slice_rows
from swsc_core.finetune import Tunable
from swsc_core.method.compress import compress
from swsc_core.method.spec import SwscSpec
from swsc_core.method.stored_values import StoredValues
from swsc_core.method.swsc_matrix import SwscMatrix, restore, restore_rows
from swsc_core.storage.location import MatrixLocation


@dataclass(frozen=True)
class CompressedSwsc(CompressedMatrix):
    """A `SwscMatrix` and its entry."""

    spec_type = SwscSpec
    entry_type = SwscEntry
    part_names = ("weight", "labels", "scales", "left", "right", "weight_scales", "left_scales", "right_scales")
    entry: SwscEntry
    matrix: SwscMatrix

    @classmethod
    def of(cls, matrix: SwscMatrix, dtype: str, location: MatrixLocation | None = None) -> "CompressedSwsc":
        """The matrix with an entry that describes it.

        Args:
            dtype: torch's name of the dtype of a restored matrix.
            location: of the matrix in a dense checkpoint; None: a tensor of its own.

        Raises:
            ValueError: no entry can describe the matrix.
        """
        layout = matrix.layout
        entry = SwscEntry(
            shape=(layout.m, layout.n),
            dtype=dtype,
            n_clusters=matrix.n_clusters,
            rank=matrix.left.shape[0],
            channel_axis=layout.channel_axis,
            segment_size=layout.size,
            codebooks=matrix.codebooks,
            scaled=matrix.scales is not None,
            centroid_bits=matrix.centroids.bits,
            factor_bits=matrix.left.bits,
            location=location or MatrixLocation(),
        )
        return cls(entry, matrix)

    @classmethod
    def compress(
        cls, weight: Tensor, spec: SwscSpec, options: CompressOptions
    ) -> tuple["CompressedSwsc", dict[str, float]]:
        matrix, stats = compress(
            weight,
            spec,
            metric=options.metric if spec.needs_hessian else None,
            seed=options.seed,
            storage_dtype=options.storage_dtype,
            name=options.name,
        )
        return cls.of(matrix, str(weight.dtype).removeprefix("torch.")), stats.to_json()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: SwscEntry) -> "CompressedSwsc":
        (m, n), layout = entry.shape, entry.layout

        def values(part: str, rows: int, columns: int, bits: int | None) -> StoredValues:
            return StoredValues((rows, columns), tensors[part], tensors.get(f"{part}_scales"), bits)

        matrix = SwscMatrix(
            layout,
            entry.codebooks,
            values("weight", entry.codebooks * entry.n_clusters, layout.size, entry.centroid_bits),
            tensors["labels"],
            tensors.get("scales"),
            values("left", entry.rank, m, entry.factor_bits),
            values("right", entry.rank, n, entry.factor_bits),
        )
        return cls(entry, matrix)

    @property
    def tensors(self) -> dict[str, Tensor]:
        matrix = self.matrix
        parts = {"labels": matrix.labels} | ({} if matrix.scales is None else {"scales": matrix.scales})
        for part, values in (("weight", matrix.centroids), ("left", matrix.left), ("right", matrix.right)):
            parts |= {part: values.data} | ({} if values.scales is None else {f"{part}_scales": values.scales})
        return parts

    def restore(self) -> Tensor:
        return restore(self.matrix, self.entry.torch_dtype)

    def restore_rows(self, rows: Tensor) -> Tensor:
        return restore_rows(self.matrix, rows)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = swsc_matmul(x, self.matrix)
        return y if bias is None else y + bias.to(y.dtype)

    def require_valid(self) -> None:
        self.matrix.require_labels()

    def slice(self, rows: Range, columns: Range) -> "CompressedSwsc":
        return self.of(slice_columns(slice_rows(self.matrix, *rows), *columns), self.entry.dtype)

    @classmethod
    def can_fuse(cls, entries: Sequence[Entry]) -> bool:
        swsc_entries = [entry for entry in entries if isinstance(entry, SwscEntry)]
        return len(swsc_entries) == len(entries) and can_fuse(swsc_entries)

    @classmethod
    def fuse(cls, matrices: Sequence["CompressedSwsc"]) -> "CompressedSwsc":
        if len(matrices) == 1:
            return matrices[0]
        return cls.of(fuse([compressed.matrix for compressed in matrices]), matrices[0].entry.dtype)

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        return _unrounded(self.matrix.left), _unrounded(self.matrix.right)

    def without_low_rank(self) -> Tensor:
        m, n = self.entry.shape
        left, right = (StoredValues((0, side), torch.empty(0, side)) for side in (m, n))
        return restore(replace(self.matrix, left=left, right=right), self.entry.torch_dtype)

    def tunable(self) -> Tunable:
        return Tunable(self.matrix)

    def with_values(self, values: Mapping[str, Tensor]) -> "CompressedSwsc":
        return replace(self, matrix=self.tunable().stored(values))


def _unrounded(values: StoredValues) -> Tensor:
    """The values in the dtype of storage, or in float32 if that is fp8 or codes."""
    return values.data if values.bits is None and values.data.itemsize > 1 else values.expand()
