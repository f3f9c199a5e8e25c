"""Where a tensor of a checkpoint lies in a file, and what it is read as."""

import math
from dataclasses import dataclass, replace

from swsc_core.storage.safetensors_header import DTYPES

TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
FLOAT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what a weight may be


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, which lies in `file` as the `nbytes` bytes from `start`, unless it is read from `fp8`.

    Attributes:
        dtype: safetensors' name of the dtype that it is read as.
        fp8: the stored fp8 weight that it is dequantized from.
        sha256: of its bytes, then of each matrix if it is a stack, as far as they are known; a reader compares them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    fp8: "Fp8Weight | None" = None
    sha256: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple["TensorInfo", ...]:
        """The tensors in the file that it is read from: itself, or an fp8 weight and its scales."""
        return (self,) if self.fp8 is None else (self.fp8.weight, self.fp8.scales)

    def expert(self, number: int) -> "TensorInfo":
        """The bytes of one matrix of a stack [experts, …], as a tensor."""
        nbytes = self.nbytes // self.shape[0]
        start = self.start + number * nbytes
        sha256 = self.sha256[1 + number : 2 + number]
        return replace(self, shape=self.shape[1:], start=start, nbytes=nbytes, sha256=sha256)


@dataclass(frozen=True)
class Fp8Weight:
    """An fp8 tensor and its scales, one for each `block` of rows and columns (quantized.py)."""

    weight: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
