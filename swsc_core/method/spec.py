"""Specs: how one matrix is compressed by one method, and how many bytes the result takes.

A spec is resolved, cluster counts and ranks are numbers. The pipeline derives specs from bit budgets
(allocation/budget.py), workers apply them (`encode` in compressed/codec.py), and reports state their bits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from swsc_core.checks import require_range
from swsc_core.method.rtn import Granularity, group_count, group_length
from swsc_core.method.segmentation import Layout
from swsc_core.method.stored_values import value_bytes
from swsc_core.storage.bits import ChannelAxis, Geometry, label_bits, rtn_bytes
from swsc_core.storage.packing import packed_bytes

MetricName = Literal["weights", "activations"]
# Labels have at most 16 bits.
MAX_CLUSTERS = 1 << 16


class Spec(ABC):
    """Base class of the specs of all methods, which are frozen dataclasses.

    Attributes:
        method: name of the method.
        has_presets: True for a method whose specs the presets of the pipeline choose or restrict.
    """

    method: str
    has_presets: ClassVar[bool] = False

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes stored for a matrix of `shape` if the storage dtype has `value_bits` bits per value."""

    @abstractmethod
    def paper_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight as the paper counts them (section IV-C, Table II)."""

    @property
    def cuts_channels(self) -> bool:
        """Whether channels are cut into segments, which are processed in slabs of rows."""
        return False

    @property
    def needs_hessian(self) -> bool:
        """Whether errors are weighted by the Hessian, the second moment of the layer's inputs."""
        return False

    @classmethod
    def require_bits(cls, bits: float | None) -> None:
        """Raise ValueError for a budget, in bits per weight, that the method cannot use; None: no budget."""
        if bits is not None and bits <= 0:
            raise ValueError(f"bits: {bits:g} is out of range (choose more than 0)")

    @classmethod
    def from_settings(cls, settings: Any, bits: float) -> Self:
        """The spec whose fields are the settings of the same names; further fields have their defaults.

        Args:
            settings: any object with settings as attributes.
            bits: the budget in bits per weight, for a method that has a field for it.
        """
        names = [spec_field.name for spec_field in fields(cls) if spec_field.name != "method"]  # type: ignore[arg-type]
        return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


@dataclass(frozen=True)
class SwscSpec(Spec):
    """Shared weights plus a low-rank compensation; with the default of every further parameter, the paper's method.

    Attributes:
        n_clusters: centroids per codebook, k in the paper; 0 stores no clusters (a truncated SVD alone).
        rank: of the compensation, r in the paper; 0 for none.
        channel_axis: channels are rows ("output") or columns ("input") of the matrix.
        n_init: starts of K-Means over whole channels; None: by the number of channels.
        segment_size: weights of a segment, which has a label of its own; None: the whole channel.
        codebooks: groups of rows with a codebook each.
        scaled: rows are divided by a stored scale before clustering.
        metric: squared errors of the weights, or of the layer's outputs (needs the Hessian).
        feedback: blocks of columns are quantized from the last to the first, and the error of each is compensated in
            the columns to its left (metric "activations").
        rounds: refinement rounds (refit, reassign, decompose) at most; refinement ends when a round does not help.
        centroid_bits, factor_bits: width of stored centroids and factors; None: the storage dtype.
    """

    n_clusters: int
    rank: int
    channel_axis: ChannelAxis = "output"
    n_init: int | None = None
    segment_size: int | None = None
    codebooks: int = 1
    scaled: bool = False
    metric: MetricName = "weights"
    feedback: bool = False
    rounds: int = 0
    centroid_bits: int | None = None
    factor_bits: int | None = None
    method: Literal["swsc"] = "swsc"
    has_presets = True

    def layout(self, shape: tuple[int, int]) -> Layout:
        """How a matrix of `shape` is cut into segments."""
        return Layout(*shape, self.channel_axis, self.segment_size or Geometry(*shape, self.channel_axis).length)

    @property
    def cuts_channels(self) -> bool:
        return self.segment_size is not None

    @property
    def needs_hessian(self) -> bool:
        return self.metric == "activations"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        (m, n), layout = shape, self.layout(shape)
        centroids = value_bytes((self.codebooks * self.n_clusters, layout.size), self.centroid_bits, value_bits)
        factors = sum(value_bytes((self.rank, side), self.factor_bits, value_bits) for side in (m, n))
        scales = m * max(value_bits, 16) // 8 if self.scaled else 0
        return centroids + packed_bytes(layout.count, label_bits(self.n_clusters)) + scales + factors

    def paper_bits(self, shape: tuple[int, int]) -> float:
        """16 (k · size + r (m + n)) / (m n): 16-bit centroids and factors, no labels (section IV-C, Table II)."""
        values = self.codebooks * self.n_clusters * self.layout(shape).size + self.rank * sum(shape)
        return 16 * values / (shape[0] * shape[1])

    def require_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise ValueError, with the remedy, unless the spec fits the matrix `name` of `shape`."""
        geometry = Geometry(*shape, self.channel_axis)
        size, length = self.segment_size or geometry.length, geometry.length
        if size < 1 or length % size:
            raise ValueError(
                f"{name}: segment_size {size} does not divide its {self.channel_axis} channels of {length}; choose a"
                " divisor"
            )
        rows = shape[0] // self.codebooks if self.codebooks > 0 else 0
        if rows * self.codebooks != shape[0] or rows % self.layout(shape).row_step:
            raise ValueError(
                f"{name}: codebooks {self.codebooks} do not divide its {shape[0]} rows into whole segments; choose a"
                " divisor"
            )
        segments = self.layout(shape).count // self.codebooks
        require_range(name, "n_clusters", self.n_clusters, 0, min(segments, MAX_CLUSTERS))
        require_range(name, "rank", self.rank, 0, min(shape))


@dataclass(frozen=True)
class RtnSpec(Spec):
    """Rounding to nearest on a grid of 2^bits values (section IV-A).

    Attributes:
        bits: width of a code, 2 to 8.
        granularity: what shares a scale: the whole tensor, an output channel, or a group of weights.
        group_size: weights per group, for granularity "group".
        symmetric: the zero point is fixed in the middle of the grid and not stored.
    """

    bits: int
    granularity: Granularity = "channel"
    group_size: int = 128
    symmetric: bool = False
    method: Literal["rtn"] = "rtn"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes of codes, zero points and scales; scales have at least 16 bits."""
        groups = group_count(shape, group_length(shape, self.granularity, self.group_size))
        return rtn_bytes(shape[0] * shape[1], self.bits, groups, max(value_bits, 16), self.symmetric)

    def paper_bits(self, shape: tuple[int, int]) -> float:
        """The width of a code, without scales."""
        return float(self.bits)

    @classmethod
    def require_bits(cls, bits: float | None) -> None:
        if bits is not None and bits not in range(2, 9):
            raise ValueError(f"bits: {bits:g} is out of range for rtn (choose a whole number from 2 to 8)")

    @classmethod
    def from_settings(cls, settings: Any, bits: float) -> Self:
        return cls(int(bits), settings.granularity, settings.group_size, settings.symmetric)
