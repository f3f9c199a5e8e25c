"""Matrices that see the same input, as one matrix: q, k and v, or gate and up.

Of whole output channels the product with the centroids is all there is to multiply, so a single product with the centroids of
all of them serves, and labels count through. Their compensations become one as well: the right factors stand one above the
other, the left ones block by block, which is a few zeros more for two products instead of six.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from swsc_core.compressed.entry import SwscEntry
from swsc_core.method.segmentation import Layout
from swsc_core.method.spec import MAX_CLUSTERS
from swsc_core.method.stored_values import StoredValues
from swsc_core.method.swsc_matrix import SwscMatrix
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import pack


def can_fuse(entries: Sequence[SwscEntry]) -> bool:
    """Whether the matrices of `entries`, of one width, share whole output channels, have plain values, and fit into one."""
    if any(not entry.n_clusters for entry in entries):
        return False
    m, n = sum(entry.shape[0] for entry in entries), entries[0].shape[1]
    kinds = {(e.channel_axis, e.segment_size, e.codebooks, e.centroid_bits, e.factor_bits) for e in entries}
    fits = sum(entry.n_clusters for entry in entries) <= MAX_CLUSTERS
    return kinds == {("output", n, 1, None, None)} and fits and sum(entry.rank for entry in entries) <= min(m, n)


def fuse(matrices: Sequence[SwscMatrix]) -> SwscMatrix:
    """The matrix [sum of m, n] of `matrices` one above the other, whose entries `can_fuse` accepts."""
    n, m = matrices[0].layout.n, sum(matrix.layout.m for matrix in matrices)
    centroids = torch.cat([matrix.centroids.data for matrix in matrices])
    left, right = (torch.block_diag(*[x.left.data for x in matrices]), torch.cat([x.right.data for x in matrices]))
    return replace(
        matrices[0],
        layout=Layout(m, n, "output", n),
        centroids=_values(centroids),
        labels=pack(_labels(matrices), label_bits(len(centroids))),
        scales=_scales(matrices),
        left=_values(left),
        right=_values(right),
    )


def _values(data: Tensor) -> StoredValues:
    return StoredValues((data.shape[0], data.shape[1]), data)


def _labels(matrices: Sequence[SwscMatrix]) -> Tensor:
    labels, first = [], 0
    for matrix in matrices:
        labels.append(matrix.indices().reshape(-1) + first)
        first += matrix.n_clusters
    return torch.cat(labels)


def _scales(matrices: Sequence[SwscMatrix]) -> Tensor | None:
    """Those of all rows, one where a matrix has none; None if no matrix has any."""
    if all(matrix.scales is None for matrix in matrices):
        return None
    like = matrices[0].centroids.data
    return torch.cat([like.new_ones(x.layout.m) if x.scales is None else x.scales for x in matrices])
