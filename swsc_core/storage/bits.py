"""Bits a weight: as the paper counts them, and as they are stored.

The paper (section IV-C, Table II) counts 16-bit centroids and factors and leaves the labels out. True bits are the
bytes that are stored, labels included, times eight, over the number of weights.
"""

from dataclasses import dataclass
from typing import Literal

from swsc_core.checks import require_range
from swsc_core.storage.packing import packed_bytes

ChannelAxis = Literal["output", "input"]


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


def rtn_bytes(m: int, n: int, bits: int, groups: int, scale_bits: int, symmetric: bool) -> int:
    """Bytes that round-to-nearest stores for one m×n matrix: packed codes, scales and packed zero points."""
    require_range("rtn", "bits", bits, 2, 8)
    zero_points = 0 if symmetric else packed_bytes(groups, bits)
    return packed_bytes(m * n, bits) + groups * scale_bits // 8 + zero_points
