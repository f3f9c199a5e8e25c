"""Bits per weight, as the paper counts them and as they are stored.

The paper (section IV-C, Table II) counts centroids and factors of 16 bits and omits the labels. True bits are the
stored bytes, labels included, times eight, divided by the number of weights.
"""

from dataclasses import dataclass
from typing import Literal

from swsc_core.checks import require_range
from swsc_core.storage.packing import packed_bytes

ChannelAxis = Literal["output", "input"]


@dataclass(frozen=True)
class Geometry:
    """An m×n weight as a set of channels: `channels` points of `length` values each (paper, section III-B).

    The channels of axis "output" are the rows of an `nn.Linear` weight, those of axis "input" its columns.
    """

    m: int
    n: int
    channel_axis: ChannelAxis

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.m if self.channel_axis == "output" else self.n

    @property
    def length(self) -> int:
        """Weights per channel."""
        return self.n if self.channel_axis == "output" else self.m

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.m * self.n


def label_bits(n_clusters: int) -> int:
    """Bits per label, ceil(log2 k); 0 for no cluster or one."""
    return max(n_clusters - 1, 0).bit_length()


def rtn_bytes(weights: int, bits: int, groups: int, scale_bits: int, symmetric: bool) -> int:
    """Bytes that round-to-nearest stores for a matrix: packed codes, scales and packed zero points.

    Args:
        weights: number of weights.
        bits: width of a code, 2 to 8.
        groups: number of groups, each with a scale and, unless `symmetric`, a zero point.
        scale_bits: width of a stored scale.
    """
    require_range("rtn", "bits", bits, 2, 8)
    zero_points = 0 if symmetric else packed_bytes(groups, bits)
    return packed_bytes(weights, bits) + groups * scale_bits // 8 + zero_points
