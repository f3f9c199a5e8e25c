"""What is to be done to one matrix, and what it will cost: values without weights.

A spec is resolved: cluster counts and ranks stand as numbers. The pipeline makes specs from bit budgets
(`bits.solve_budget`), workers carry them out (`codec.encode`), reports quote their bits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from swsc_core.method.rtn import Granularity, group_count, group_length
from swsc_core.method.segmentation import Layout
from swsc_core.method.stored_values import value_bytes
from swsc_core.storage.bits import ChannelAxis, Geometry, label_bits, rtn_bytes
from swsc_core.storage.packing import packed_bytes

MetricName = Literal["weights", "activations"]
MAX_CLUSTERS = 1 << 16  # labels of more bits are not packed


class Spec(ABC):
    """What is done to one matrix by one method; a method's own specs are frozen dataclasses.

    Attributes:
        method: name of the method.
        has_presets: True for a method whose specs the presets of the pipeline choose or restrict.
    """

    method: str
    has_presets: ClassVar[bool] = False

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes stored for a matrix of `shape` whose storage dtype has `value_bits` bits a value."""

    @abstractmethod
    def paper_bits(self, shape: tuple[int, int]) -> float:
        """Bits a weight as the paper counts them (Table II)."""

    @property
    def cuts_channels(self) -> bool:
        """Whether channels are cut into segments, which are worked through in slabs of rows."""
        return False

    @property
    def needs_hessian(self) -> bool:
        """Whether errors are weighed by second moments of the layer's inputs."""
        return False

    @classmethod
    def require_bits(cls, bits: float | None) -> None:
        """Raise ValueError for a bit budget, in bits per weight, that the method cannot use; None: no budget is given."""
        if bits is not None and bits <= 0:
            raise ValueError(f"bits: {bits:g} is out of range (choose more than 0)")

    @classmethod
    def from_settings(cls, settings: Any, bits: float) -> Self:
        """The spec whose fields are the settings of the same names; others keep their defaults.

        Args:
            bits: the budget in bits a weight, for a method that has a field for it.
        """
        names = [one.name for one in fields(cls) if one.name != "method"]  # type: ignore[arg-type]
        return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


@dataclass(frozen=True)
class SwscSpec(Spec):
    """One member of the family whose plainest is the paper's method: all defaults are the paper's.

    Attributes:
        n_clusters: centroids of a codebook; 0 stores no clusters (a pure truncated SVD).
        rank: of the compensation; 0 for none.
        channel_axis: channels are rows ("output") or columns ("input").
        n_init: starts of K-Means over whole channels.
        segment_size: weights of a piece of a channel that shares on its own; None: the whole channel.
        codebooks: row groups of the matrix with a codebook each.
        scaled: each row is divided by a scale of its own before it shares.
        metric: plain squared errors of weights, or of the layer's outputs (needs a second moment).
        feedback: the error of each block of columns is fed into the columns before it (metric "activations").
        rounds: of reassigning, refitting and decomposing again, while that helps.
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
        """As the paper counts: 16-bit centroids and factors, nothing else."""
        values = self.codebooks * self.n_clusters * self.layout(shape).size + self.rank * sum(shape)
        return 16 * values / (shape[0] * shape[1])

    def shape_error(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of `shape` cannot be compressed so, with the remedy; None if it can."""
        geometry = Geometry(*shape, self.channel_axis)
        size = self.segment_size or geometry.length
        if size < 1 or geometry.length % size:
            return f"segment_size {size} does not divide its {self.channel_axis} channels of {geometry.length}; choose a divisor"
        rows = shape[0] // self.codebooks if self.codebooks > 0 else 0
        if rows * self.codebooks != shape[0] or rows % self.layout(shape).row_step:
            return f"codebooks {self.codebooks} do not divide its {shape[0]} rows into whole segments; choose a divisor"
        segments = self.layout(shape).count // self.codebooks
        if not 0 <= self.n_clusters <= min(segments, MAX_CLUSTERS):
            return f"n_clusters {self.n_clusters} is out of range; choose 0 to {min(segments, MAX_CLUSTERS)}"
        if not 0 <= self.rank <= min(shape):
            return f"rank {self.rank} is out of range; choose 0 to {min(shape)}"
        return None


@dataclass(frozen=True)
class RtnSpec(Spec):
    """Round to nearest on a grid of 2^bits values; `group_size` counts for granularity "group" only."""

    bits: int
    granularity: Granularity = "channel"
    group_size: int = 128
    symmetric: bool = False
    method: Literal["rtn"] = "rtn"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes of codes, zero points and scales; scales are never fp8."""
        groups = group_count(shape, group_length(shape, self.granularity, self.group_size))
        return rtn_bytes(*shape, self.bits, groups, max(value_bits, 16), self.symmetric)

    def paper_bits(self, shape: tuple[int, int]) -> float:
        """The width of a code: scales are left out."""
        return float(self.bits)

    @classmethod
    def require_bits(cls, bits: float | None) -> None:
        if bits is not None and bits not in range(2, 9):
            raise ValueError(f"bits: {bits:g} is out of range for rtn (choose a whole number from 2 to 8)")

    @classmethod
    def from_settings(cls, settings: Any, bits: float) -> Self:
        return cls(int(bits), settings.granularity, settings.group_size, settings.symmetric)
