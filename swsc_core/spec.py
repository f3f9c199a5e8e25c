"""What is to be done to one matrix, and what it will cost: values without weights.

A spec is resolved: cluster counts and ranks stand as numbers. The pipeline makes specs from bit budgets
(`bits.solve_budget`), workers carry them out (`codec.encode`), reports quote their bits.
"""

from dataclasses import dataclass
from typing import Literal

from swsc_core.bits import ChannelAxis, Geometry, paper_bits, rtn_bytes, swsc_bytes
from swsc_core.rtn import Granularity, group_count, group_length


@dataclass(frozen=True)
class SwscSpec:
    """The paper's method: `n_clusters` shared channels and a rank-`rank` compensation.

    n_clusters = 0 stores no clusters (a pure truncated SVD), rank = 0 no compensation.
    """

    n_clusters: int
    rank: int
    channel_axis: ChannelAxis = "output"
    n_init: int | None = None
    method: Literal["swsc"] = "swsc"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes stored for a matrix of `shape` whose centroids and factors have `value_bits` bits a value."""
        return swsc_bytes(Geometry(*shape, self.channel_axis), self.n_clusters, self.rank, value_bits)

    def paper_bits(self, shape: tuple[int, int]) -> float:
        """Bits a weight as the paper counts them (Table II)."""
        return paper_bits(Geometry(*shape, self.channel_axis), self.n_clusters, self.rank)


@dataclass(frozen=True)
class RtnSpec:
    """Round to nearest on a grid of 2^bits values; `group_size` counts for granularity "group" only."""

    bits: int
    granularity: Granularity = "channel"
    group_size: int = 128
    symmetric: bool = False
    method: Literal["rtn"] = "rtn"

    def stored_bytes(self, shape: tuple[int, int], value_bits: int) -> int:
        """Bytes stored for a matrix of `shape` whose scales have `value_bits` bits."""
        groups = group_count(shape, group_length(shape, self.granularity, self.group_size))
        return rtn_bytes(*shape, self.bits, groups, value_bits, self.symmetric)

    def paper_bits(self, shape: tuple[int, int]) -> float:
        """Bits a weight as the paper counts them: the width of a code, scales left out."""
        return float(self.bits)


Spec = SwscSpec | RtnSpec
