"""The interface that every compression method implements, one class per method (methods.py lists them)."""

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

Range = tuple[int, int]  # first index, and the first after the last


@dataclass(frozen=True)
class CompressOptions:
    """What a compression is given beside the weight and its spec.

    Attributes:
        name: of the tensor; part of its seed, and named in errors.
        seed: of the run.
        storage_dtype: of stored values; None for the dtype of the weight.
        metric: second moments of the inputs, for specs that weigh errors by them.
    """

    name: str = "weight"
    seed: int = 0
    storage_dtype: torch.dtype | None = None
    metric: Metric | None = None


class CompressedMatrix(ABC):
    """One compressed matrix [m, n] as it is stored.

    A subclass states the class of its specs, that of its entries (which names the method), and the names of all tensors that it may
    store, "weight" first.
    Methods that are not abstract have an implementation by the restored matrix, or refuse what a method need not offer.

    Attributes:
        entry: what config.json states about the matrix.
    """

    spec_type: ClassVar[type[Spec]]
    entry_type: ClassVar[type[Entry]]
    part_names: ClassVar[tuple[str, ...]]
    entry: Any  # an instance of `entry_type`

    @classmethod
    @abstractmethod
    def compress(cls, weight: Tensor, spec: Any, options: CompressOptions) -> tuple[Self, dict[str, Any]]:
        """Compress `weight` [m, n]; also returns measurements ("…_seconds", "energy"). ValueError names the tensor."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], entry: Any) -> Self:
        """The matrix of stored tensors, whose shapes are those of `entry.part_shapes()`."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Part name -> stored tensor, as `entry.part_shapes()` names them."""

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
        """Raise ValueError if a stored value cannot be: a label that names no centroid."""
        return

    def slice(self, rows: Range, columns: Range) -> "CompressedMatrix":
        """W[rows[0]:rows[1], columns[0]:columns[1]], compressed; ValueError if that cannot be stored.

        Its location is that of a tensor of its own.
        """
        raise ValueError(f"a matrix of method {self.entry.method} is not sliced")

    @classmethod
    def can_fuse(cls, entries: Sequence[Entry]) -> bool:
        """Whether matrices of these entries, of one width, can be one matrix of their rows one above the other."""
        return False

    @classmethod
    def fuse(cls, matrices: Sequence[Self]) -> "CompressedMatrix":
        """The matrix [sum of m, n] of matrices that `can_fuse` accepts."""
        raise NotImplementedError

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """left [r, m] and right [r, n], exactly: in their own dtype, or float32 where they are stored in few bits."""
        raise ValueError(f"a matrix of method {self.entry.method} has no low-rank part")

    def without_low_rank(self) -> Tensor:
        """The dense matrix without its low-rank part, [m, n]."""
        return self.restore()

    def tunable(self) -> Tunable:
        """The stored values as parameters of a loss."""
        raise ValueError(f"stored values of method {self.entry.method} are not tuned")

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """The matrix with other stored values, as `tunable` names them."""
        raise ValueError(f"stored values of method {self.entry.method} are not tuned")
