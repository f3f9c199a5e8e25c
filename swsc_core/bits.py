"""Bits a weight: as the paper counts them, and as they are stored.

The paper (section IV-C, Table II) counts 16-bit centroids and factors and leaves the labels out. True bits are the
bytes that are stored, labels included, times eight, over the number of weights.
"""

from dataclasses import dataclass
from typing import Literal

from swsc_core.checks import require_range
from swsc_core.packing import packed_bytes

ChannelAxis = Literal["output", "input"]
Count = Literal["true", "paper"]


@dataclass(frozen=True)
class Geometry:
    """An m×n weight seen as channels: `channels` points of `length` values each.

    `output`: channels are the rows of an `nn.Linear` weight; `input`: its columns.
    """

    m: int
    n: int
    channel_axis: ChannelAxis

    @property
    def channels(self) -> int:
        return self.m if self.channel_axis == "output" else self.n

    @property
    def length(self) -> int:
        return self.n if self.channel_axis == "output" else self.m

    @property
    def weights(self) -> int:
        return self.m * self.n


def label_bits(n_clusters: int) -> int:
    """Bits of one label: ceil(log2 k); none for zero clusters or one."""
    return max(n_clusters - 1, 0).bit_length()


def swsc_bytes(geometry: Geometry, n_clusters: int, rank: int, value_bits: int) -> int:
    """Bytes that SWSC stores for one matrix: centroids, packed labels and both factors."""
    values = n_clusters * geometry.length + rank * (geometry.m + geometry.n)
    return values * value_bits // 8 + packed_bytes(geometry.channels, label_bits(n_clusters))


def paper_bits(geometry: Geometry, n_clusters: int, rank: int) -> float:
    """Average bits as Table II counts them: 16-bit values, labels left out."""
    return 16 * (n_clusters * geometry.length + rank * (geometry.m + geometry.n)) / geometry.weights


def solve_budget(
    geometry: Geometry, bits: float, *, cluster_share: float = 0.5, value_bits: int = 16, count: Count = "true"
) -> tuple[int, int]:
    """Largest (n_clusters, rank) that a budget of `bits` a weight buys.

    Args:
        geometry: of the matrix.
        bits: budget in bits a weight, > 0.
        cluster_share: share of the budget that goes to centroids and labels; what they leave goes to the rank.
        value_bits: width of a stored centroid or factor value.
        count: "true" counts stored bytes at `value_bits`; "paper" as `paper_bits`.

    Returns:
        n_clusters in 0 .. channels - 1 and rank in 0 .. min(m, n), not both zero.

    Raises:
        ValueError: the budget does not buy one cluster or one rank, or the share is not in 0 .. 1.
    """
    if not 0 <= cluster_share <= 1:
        raise ValueError(f"cluster_share {cluster_share} is out of range; choose 0 to 1")

    def cost(n_clusters: int, rank: int) -> float:
        if count == "paper":
            return paper_bits(geometry, n_clusters, rank)
        return 8 * swsc_bytes(geometry, n_clusters, rank, value_bits) / geometry.weights

    n_clusters = _largest(lambda k: cost(k, 0) <= cluster_share * bits, geometry.channels - 1)
    rank = _largest(lambda r: cost(n_clusters, r) <= bits, min(geometry.m, geometry.n))
    if n_clusters == 0 and rank == 0:
        least = min(cost(1, 0), cost(0, 1))
        raise ValueError(f"{bits} bits a weight buy nothing on {geometry.m}×{geometry.n}; the least is {least:.3f}")
    return n_clusters, rank


def _largest(fits, upper: int) -> int:  # type: ignore[no-untyped-def]
    """Largest integer in 0 .. upper for which the monotone predicate `fits` holds (0 is taken to fit)."""
    low, high = 0, max(upper, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def rtn_bytes(m: int, n: int, bits: int, groups: int, scale_bits: int, symmetric: bool) -> int:
    """Bytes that round-to-nearest stores for one m×n matrix: packed codes, scales and packed zero points."""
    require_range("rtn", "bits", bits, 2, 8)
    zero_points = 0 if symmetric else packed_bytes(groups, bits)
    return packed_bytes(m * n, bits) + groups * scale_bits // 8 + zero_points
