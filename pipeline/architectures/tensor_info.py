"""Name, dtype, shape and byte range of a tensor in a checkpoint."""

import math
from dataclasses import dataclass, replace

from swsc_core.storage.safetensors_header import DTYPES

TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
# Dtypes that a weight may have, by their names in safetensors.
FLOAT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is stored in `file` as the `nbytes` bytes from `start` on, or is dequantized from `fp8`.

    Attributes:
        dtype: name in safetensors of the dtype that the tensor is read as.
        fp8: the stored fp8 weight; None for any other tensor.
        sha256: known digests, which readers compare: of the tensor, then of each matrix if the tensor stacks experts.
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
        """The stored tensors that are read for this one: itself, or an fp8 weight and its scales."""
        return (self,) if self.fp8 is None else (self.fp8.weight, self.fp8.scales)

    def expert(self, number: int) -> "TensorInfo":
        """Return matrix `number` of stacked experts [experts, …] as a tensor of its own."""
        nbytes = self.nbytes // self.shape[0]
        start = self.start + number * nbytes
        sha256 = self.sha256[1 + number : 2 + number]
        return replace(self, shape=self.shape[1:], start=start, nbytes=nbytes, sha256=sha256)


@dataclass(frozen=True)
class Fp8Weight:
    """An fp8 tensor and its scales, one for each `block` of rows and columns (`checkpoints/fp8_source.py`)."""

    weight: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
