"""Split of a bit budget between clusters and rank (paper, section IV-C); one half each by default."""

from collections.abc import Callable
from typing import Literal

from swsc_core.method.spec import SwscSpec
from swsc_core.storage.bits import Geometry

BitCount = Literal["true", "paper"]


def solve_budget(
    geometry: Geometry, bits: float, *, cluster_share: float = 0.5, value_bits: int = 16, count: BitCount = "true"
) -> tuple[int, int]:
    """Largest (n_clusters, rank) within a budget of `bits` bits per weight.

    Args:
        geometry: of the matrix.
        bits: budget in bits per weight, > 0.
        cluster_share: share of the budget for centroids and labels, 0 to 1; the remainder is for the rank.
        value_bits: width of a stored centroid or factor value.
        count: "true" counts stored bytes at `value_bits`; "paper" counts as Table II does.

    Returns:
        n_clusters in 0 .. channels - 1 and rank in 0 .. min(m, n), not both zero.

    Raises:
        ValueError: the budget is too small for one cluster or rank one, or the share is out of range.
    """
    if not 0 <= cluster_share <= 1:
        raise ValueError(f"cluster_share {cluster_share} is out of range; choose 0 to 1")

    def cost(n_clusters: int, rank: int) -> float:
        spec, shape = SwscSpec(n_clusters, rank, geometry.channel_axis), (geometry.m, geometry.n)
        if count == "paper":
            return spec.paper_bits(shape)
        return 8 * spec.stored_bytes(shape, value_bits) / geometry.weights

    n_clusters = _largest(lambda k: cost(k, 0) <= cluster_share * bits, geometry.channels - 1)
    rank = _largest(lambda r: cost(n_clusters, r) <= bits, min(geometry.m, geometry.n))
    if n_clusters == 0 and rank == 0:
        least = min(cost(1, 0), cost(0, 1))
        shape = f"{geometry.m}×{geometry.n}"
        raise ValueError(f"{bits} bits per weight are too few for a matrix of {shape}; the least is {least:.3f}")
    return n_clusters, rank


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """Largest integer in 0 .. upper for which the monotone predicate `fits` holds; `fits(0)` is assumed."""
    low, high = 0, max(upper, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
