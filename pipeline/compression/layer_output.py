"""The output of one layer: the tensors of its file, and the report rows of its matrices."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.tensor_io import StoredTensor, to_stored_tensor
from pipeline.models.matrices import FusedTensor
from pipeline.models.matrix_reader import SourceMatrix
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from swsc_core import Encoded
from swsc_core.compressed.codec import dtype_name
from swsc_core.compressed.config_json import part_name
from swsc_core.storage.row_blocks import fuse_rows, remaining_rows
from swsc_core.storage.safetensors_header import DTYPES


class LayerParts:
    """Collects the stored tensors of one layer: each matrix, then the remaining rows of fused tensors."""

    def __init__(self, form: str) -> None:
        """`form` is "swsc", or "dense" for restored weights in the layout of the source."""
        self._form = form
        self._parts: list[StoredTensor] = []
        # fused tensor -> its restored matrices, in the dense form
        self._restored: dict[str, list[Tensor]] = {}

    def add(self, info: MatrixInfo, encoded: Encoded) -> None:
        """Add a compressed matrix."""
        if self._form == "swsc":
            self._parts += [
                to_stored_tensor(part_name(info.name, part), tensor) for part, tensor in encoded.tensors.items()
            ]
        elif info.location.row_blocks is None:
            self._parts.append(to_stored_tensor(info.name, info.location.to_checkpoint_layout(encoded.restored)))
        else:
            self._restored.setdefault(info.tensor.name, []).append(encoded.restored.cpu())

    def add_remaining_rows(self, fused: FusedTensor, read: Callable[[MatrixInfo], Tensor]) -> None:
        """Add the remaining rows of a fused tensor, or in the dense form the whole tensor.

        All its compressed matrices must have been added before. `read` returns a matrix of the source.
        """
        rows, name = _remaining_rows(fused, read), fused.tensor.name
        if self._form == "dense":
            matrix = fuse_rows(rows, fused.row_blocks, self._restored.pop(name))
            rows = fused.matrices[0].location.to_checkpoint_layout(matrix)
        self._parts.append(to_stored_tensor(name, rows))

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All parts of the layer's file."""
        return tuple(self._parts)


def _remaining_rows(fused: FusedTensor, read: Callable[[MatrixInfo], Tensor]) -> Tensor:
    """Rows of a fused tensor that belong to no compressed matrix, [remaining, n], on the CPU.

    Only the matrices that contain such rows are read.
    """
    (m, n), matrices = fused.shape, fused.fused_matrices
    remaining, height = remaining_rows(m, fused.row_blocks), m // len(matrices)
    slices = [torch.empty(0, n, dtype=getattr(torch, DTYPES[fused.tensor.dtype][0]))]
    for number, matrix in enumerate(matrices):
        first = height * number
        rows = remaining[(remaining >= first) & (remaining < first + height)] - first
        if len(rows):
            slices.append(read(matrix)[rows])
    return torch.cat(slices)


def matrix_result(matrix: SourceMatrix, encoded: Encoded, seconds: float, hessians: Hessians | None) -> MatrixResult:
    """Report row and config.json entry of a matrix that `encode` compressed in `seconds`."""
    info, spec, cluster_error = matrix.info, encoded.spec, encoded.stats.get("cluster_error")
    assert spec is not None
    row = CompressedRow(
        info.name,
        info.shape,
        dtype_name(encoded.restored.dtype),
        spec.method,
        bits_per_weight=8 * encoded.stored_bytes / info.count,
        paper_bits=spec.paper_bits(info.shape),
        cluster_mean_squared_error=None if cluster_error is None else cluster_error / info.count,
        read_seconds=matrix.seconds,
        seconds=seconds,
        stored_bytes=encoded.stored_bytes,
        stats=encoded.stats,
        source_sha256=matrix.sha256,
        calibration_tokens=hessians.tokens(info.name) if hessians else None,
        moments_sha256=hessians.sha256(info.name) if hessians else None,
    )
    return MatrixResult(with_errors(row, encoded), replace(encoded.entry, location=info.location))


def with_errors(row: CompressedRow, encoded: Encoded) -> CompressedRow:
    """`row` with the relative and mean squared error of `encoded`, and the mean square of the weights."""
    count = encoded.restored.numel()
    return replace(
        row,
        relative_error=encoded.relative_error,
        mean_squared_error=encoded.squared_error / count,
        mean_square=encoded.squared_norm / count,
    )
