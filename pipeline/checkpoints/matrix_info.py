"""A matrix of a checkpoint, which is the unit of compression, and its location in the stored tensors."""

from dataclasses import dataclass, replace

from pipeline.architectures.tensor_info import TensorInfo
from swsc_core.compressed.config_json import piece_name
from swsc_core.storage.location import MatrixLocation
from swsc_core.storage.row_blocks import RowBlocks
from swsc_core.storage.safetensors_header import BITS


@dataclass(frozen=True)
class MatrixInfo:
    """A matrix [outputs, inputs]: a whole tensor, some rows of one, the matrix of an expert, or some rows of that.

    Attributes:
        name: name of the compressed matrix: that of the tensor, or of a piece of it
            (`swsc_core.compressed.config_json.piece_name`).
        shape: [m, n].
        tensor: the tensor that holds the matrix.
        location: location of the matrix in the tensor.
        role: role in the model ("q", "down"); None if the family table has none.
    """

    name: str
    shape: tuple[int, int]
    tensor: TensorInfo
    location: MatrixLocation
    role: str | None = None

    @property
    def dtype(self) -> str:
        """Name of the dtype in safetensors."""
        return self.tensor.dtype

    @property
    def file(self) -> str:
        """The file that holds the tensor."""
        return self.tensor.file

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.count * BITS[self.dtype] // 8

    @property
    def expert(self) -> int | None:
        """Number of the expert; None if the tensor does not stack experts."""
        return self.location.expert(self._fused_rows)

    @property
    def rows(self) -> RowBlocks | None:
        """Rows of the `fused` matrix; None: all of them."""
        rows = self.location.rows_in_expert(self._fused_rows)
        return None if self.expert is not None and rows == RowBlocks(0, *2 * (self._fused_rows,), 1) else rows

    @property
    def fused(self) -> "MatrixInfo":
        """The matrix that is read at once: the whole tensor, or the whole matrix of the expert."""
        if self.rows is None:
            return self
        if self.expert is None:
            return whole_matrix(self.tensor, self.location.transposed)
        return expert_matrix(self.tensor, self.expert, self.location.transposed)

    @property
    def read_from(self) -> TensorInfo:
        """The tensor that is read: the whole one, or the bytes of one expert."""
        return self.tensor if self.expert is None else self.tensor.expert(self.expert)

    @property
    def _fused_rows(self) -> int:
        a, b = self.tensor.shape[-2:]
        return b if self.location.transposed else a

    def piece(self, name: str, rows: RowBlocks, role: str | None) -> "MatrixInfo":
        """Return some rows, counted from the first row of this matrix, as a matrix of its own."""
        fused = self.location
        first = fused.row_blocks.first if fused.row_blocks else 0
        location = replace(fused, tensor=self.tensor.name, row_blocks=rows.shifted(first))
        return MatrixInfo(piece_name(self.name, name), (rows.total, self.shape[1]), self.tensor, location, role)


def whole_matrix(tensor: TensorInfo, transposed: bool = False, role: str | None = None) -> MatrixInfo:
    """Return the matrix of a two-dimensional tensor."""
    a, b = tensor.shape
    return MatrixInfo(
        tensor.name, (b, a) if transposed else (a, b), tensor, MatrixLocation(transposed=transposed), role
    )


def expert_matrix(tensor: TensorInfo, number: int, transposed: bool, role: str | None = None) -> MatrixInfo:
    """Return the matrix of one expert of a stack [experts, …]."""
    experts, a, b = tensor.shape
    m, n = (b, a) if transposed else (a, b)
    location = MatrixLocation(tensor.name, transposed, RowBlocks(number * m, m, m, 1), experts)
    return MatrixInfo(piece_name(tensor.name, str(number)), (m, n), tensor, location, role)
