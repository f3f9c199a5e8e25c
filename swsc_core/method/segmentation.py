"""How a matrix is cut into segments, the pieces of channels that share a codebook.

A channel of `length` weights is cut into length / size segments; with size = length a segment is a whole channel, as in
the paper. Segments are worked through block by block of columns, because the error of a block is made up for by the
columns before it: a block is `size` columns for output channels (one segment a row), one column for input channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.storage.bits import ChannelAxis

_LEAST_SLAB, _SLAB, _SLABS = 1 << 19, 1 << 21, 16  # weights of a slab, and the number of them from which it grows

GPU_SLAB_WEIGHTS = (
    1 << 28
)  # of one on a GPU, where time goes by the number of blocks: never by free memory, on which sums would then depend


@dataclass(frozen=True)
class Layout:
    """Segments of `size` weights along the channels of `channel_axis` of an m×n matrix."""

    m: int
    n: int
    channel_axis: ChannelAxis
    size: int

    @property
    def count(self) -> int:
        """Number of segments."""
        return self.m * self.n // self.size

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.size if self.channel_axis == "output" else 1

    @property
    def row_step(self) -> int:
        """Rows that a segment spans: row blocks are multiples of it."""
        return 1 if self.channel_axis == "output" else self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of the labels: rows of segments and blocks of columns."""
        return self.m // self.row_step, self.n // self.width

    def segments(self, rows: Tensor) -> Tensor:
        """[rows, n] -> [segments, size], in the order of the labels. The matrix may hold any multiple of `row_step` rows."""
        if self.channel_axis == "output":
            return rows.reshape(-1, self.size)
        return rows.reshape(-1, self.size, self.n).transpose(1, 2).reshape(-1, self.size)

    def places(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64 [count, size] each, of the weights of some segments, int64 [count]."""
        along = torch.arange(self.size, device=segments.device)
        if self.channel_axis == "output":
            blocks = self.n // self.size
            rows, columns = segments // blocks, segments % blocks * self.size
            return rows[:, None].expand(-1, self.size), columns[:, None] + along
        rows, columns = segments // self.n * self.size, segments % self.n
        return rows[:, None] + along, columns[:, None].expand(-1, self.size)

    def matrix(self, segments: Tensor) -> Tensor:
        """Inverse of `segments`."""
        if self.channel_axis == "output":
            return segments.reshape(-1, self.n)
        return segments.reshape(-1, self.n, self.size).transpose(1, 2).reshape(-1, self.n)


def slab_values(count: int) -> int:
    """Weights of a slab of rows of a matrix of `count`. About five temporaries of its size are alive at a time: all of them
    together are less than half of a large matrix, and a small one is done in one piece."""
    return min(_SLAB, max(_LEAST_SLAB, count // _SLABS))
