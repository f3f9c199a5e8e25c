"""The interface that every compression method implements, one class per method (registry.py lists them)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from swsc_core.compressed.entry import Entry
from swsc_core.finetune import Tunable
from swsc_core.method.metric import Metric
from swsc_core.method.spec import Spec

# First index, and the index after the last.
Range = tuple[int, int]
# Key of the weighted error among the measurements of a method; reports have used it since their first version.
WEIGHTED_ERROR = "energy"


@dataclass(frozen=True)
class CompressOptions:
    """Arguments of a compression besides the weight and its spec.

    Attributes:
        name: of the tensor; part of its seed, and named in errors.
        seed: of the run.
        storage_dtype: of stored values; None for the dtype of the weight.
        metric: cost of an error, for specs that weight errors by the Hessian of the inputs.
    """

    name: str = "weight"
    seed: int = 0
    storage_dtype: torch.dtype | None = None
    metric: Metric | None = None


class CompressedMatrix(ABC):
    """One compressed matrix [m, n] as it is stored.

    Methods that are not abstract have a default implementation that uses the restored matrix, or raises ValueError for
    an operation that a compression method need not offer.

    Attributes:
        spec_type: class of the specs of the method.
        entry_type: class of its entries, which states the name of the method.
        part_names: names of all tensors that the method may store, "weight" first.
        entry: the entry of config.json for this matrix.
    """

    spec_type: ClassVar[type[Spec]]
    entry_type: ClassVar[type[Entry]]
    part_names: ClassVar[tuple[str, ...]]
    entry: Any  # an instance of `entry_type`

    @classmethod
    @abstractmethod
    def compress(cls, weight: Tensor, spec: Any, options: CompressOptions) -> tuple[Self, dict[str, float]]:
        """Compress `weight` [m, n].

        Returns:
            The compressed matrix, and measurements by their keys in reports: seconds ("…_seconds"), and optionally
            WEIGHTED_ERROR and "cluster_error".

        Raises:
            ValueError: the weight or the spec is invalid; the message names the tensor.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: Any) -> Self:
        """The matrix of stored tensors with the shapes of `entry.part_shapes()`."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Part name of `entry.part_shapes()` -> stored tensor."""

    @abstractmethod
    def restore(self) -> Tensor:
        """The dense matrix [m, n] in the dtype of the entry."""

    def restore_rows(self, rows: Tensor) -> Tensor:
        """Rows of the dense matrix by their indices, int64 [count]: [count, n], float32 or the dtype of the entry."""
        return self.restore()[rows]

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] times Wᵀ plus the bias [m]: [..., m]."""
        with torch.no_grad():
            weight = self.restore().to(x.dtype)
        return linear(x, weight, None if bias is None else bias.to(x.dtype))

    def require_valid(self) -> None:
        """Raise ValueError if a stored value is impossible, such as a label that names no centroid."""
        return

    def slice(self, rows: Range, columns: Range) -> "CompressedMatrix":
        """W[rows[0]:rows[1], columns[0]:columns[1]] as a compressed matrix, whose location is a tensor of its own.

        Raises:
            ValueError: the slice cannot be stored by this method.
        """
        raise ValueError(f"a matrix of method {self.entry.method} cannot be sliced; use tensor parallel size 1")

    @classmethod
    def can_fuse(cls, entries: Sequence[Entry]) -> bool:
        """Whether matrices of these entries, of equal width, can be concatenated to one compressed matrix."""
        return False

    @classmethod
    def fuse(cls, matrices: Sequence[Self]) -> "CompressedMatrix":
        """Concatenation [sum of m, n] of the rows of matrices whose entries `can_fuse` accepts."""
        raise NotImplementedError

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """Factors left [r, m] and right [r, n], unrounded: in the storage dtype, or in float32 for fp8 and codes."""
        raise ValueError(f"a matrix of method {self.entry.method} has no low-rank part")

    def without_low_rank(self) -> Tensor:
        """The dense matrix [m, n] without its low-rank part."""
        return self.restore()

    def tunable(self) -> Tunable:
        """The stored values as parameters of a loss."""
        raise ValueError(f"stored values of method {self.entry.method} cannot be tuned; exclude the tensor from tuning")

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """The matrix with other stored values, under the names of `tunable`."""
        raise ValueError(f"stored values of method {self.entry.method} cannot be tuned; exclude the tensor from tuning")
