"""Where a tensor lies in a file and what it is: a range of bytes, or what is made of one."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swsc_core.safetensors_header import DTYPES

if TYPE_CHECKING:
    from swsc_core.row_blocks import RowBlocks

TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what a weight may be


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `start` of `file`; or, if it is a `view`, what it looks like.

    `sha256`: of its bytes, and of each matrix of a stack, as far as they are known; then it is held against them when it is read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    view: "View | None" = None
    sha256: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple["TensorInfo", ...]:
        """What lies in the file: itself, unless it is a view."""
        if self.view is None:
            return (self,)
        return (*self.view.tensor.stored, *((self.view.scales,) if self.view.scales else ()))


@dataclass(frozen=True)
class View:
    """How a tensor is made of `tensor`, which is what lies in the file.

    Attributes:
        expert: this matrix of it, if it is a stack of them; nothing else is read then.
        transposed: rows and columns change places.
        rows: then these rows of it.
        scales: what it is multiplied with (quantized.py), a scale for each `block` of rows and columns.
    """

    tensor: TensorInfo
    transposed: bool = False
    rows: "RowBlocks | None" = None
    expert: int | None = None
    scales: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def read(self) -> TensorInfo:
        """What of the tensor is read: all, or the bytes of one matrix of a stack."""
        if self.expert is None:
            return self.tensor
        nbytes = self.tensor.nbytes // self.tensor.shape[0]
        start = self.tensor.start + self.expert * nbytes
        own = self.tensor.sha256[1 + self.expert : 2 + self.expert]
        return replace(self.tensor, shape=self.tensor.shape[1:], start=start, nbytes=nbytes, sha256=own)
