"""The paper's split of a budget between clusters and rank (section IV-C): half and half, unless told otherwise."""

from typing import Literal

from swsc_core.method.spec import SwscSpec
from swsc_core.storage.bits import Geometry

BitCount = Literal["true", "paper"]


def solve_budget(
    geometry: Geometry, bits: float, *, cluster_share: float = 0.5, value_bits: int = 16, count: BitCount = "true"
) -> tuple[int, int]:
    """Largest (n_clusters, rank) that a budget of `bits` a weight buys.

    Args:
        geometry: of the matrix.
        bits: budget in bits a weight, > 0.
        cluster_share: share of the budget that goes to centroids and labels; what they leave goes to the rank.
        value_bits: width of a stored centroid or factor value.
        count: "true" counts stored bytes at `value_bits`; "paper" as Table II does.

    Returns:
        n_clusters in 0 .. channels - 1 and rank in 0 .. min(m, n), not both zero.

    Raises:
        ValueError: the budget does not buy one cluster or one rank, or the share is not in 0 .. 1.
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
        raise ValueError(f"{bits} bits a weight buy nothing on {geometry.m}×{geometry.n}; the least is {least:.3f}")
    return n_clusters, rank


def _largest(fits, upper: int) -> int:  # type: ignore[no-untyped-def]
    """Largest integer in 0 .. upper for which the monotone predicate `fits` holds (0 is taken to fit)."""
    low, high = 0, max(upper, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
