"""Fusion of matrices with the same input, such as q, k and v, or gate and up, to one compressed matrix.

With whole output channels a layer multiplies its input by the centroids only. The fused matrix multiplies once, by the
centroids of all matrices, whose labels are renumbered. The compensations are fused too: right factors are concatenated
and left factors form a block diagonal, which costs a few zeros and saves four of six products.
"""

from collections.abc import Callable, Sequence
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

# torch does not annotate it.
_block_diagonal: Callable[..., Tensor] = torch.block_diag


def can_fuse(entries: Sequence[SwscEntry]) -> bool:
    """Whether matrices of these entries, with equal numbers of columns, can be fused.

    They must have whole output channels and floating point values, and the result must be within the limits of one
    matrix.
    """
    if any(not entry.n_clusters for entry in entries):
        return False
    m, n = sum(entry.shape[0] for entry in entries), entries[0].shape[1]
    forms = {(e.channel_axis, e.segment_size, e.codebooks, e.centroid_bits, e.factor_bits) for e in entries}
    is_within_limits = sum(entry.n_clusters for entry in entries) <= MAX_CLUSTERS and sum(
        entry.rank for entry in entries
    ) <= min(m, n)
    return forms == {("output", n, 1, None, None)} and is_within_limits


def fuse(matrices: Sequence[SwscMatrix]) -> SwscMatrix:
    """Concatenation [sum of m, n] of the rows of `matrices`, whose entries `can_fuse` accepts."""
    n, m = matrices[0].layout.n, sum(matrix.layout.m for matrix in matrices)
    centroids = torch.cat([matrix.centroids.data for matrix in matrices])
    left = _block_diagonal(*[matrix.left.data for matrix in matrices])
    right = torch.cat([matrix.right.data for matrix in matrices])
    return replace(
        matrices[0],
        layout=Layout(m, n, "output", n),
        centroids=_values(centroids),
        labels=pack(_renumbered_labels(matrices), label_bits(len(centroids))),
        scales=_fused_scales(matrices),
        left=_values(left),
        right=_values(right),
    )


def _values(data: Tensor) -> StoredValues:
    return StoredValues((data.shape[0], data.shape[1]), data)


def _renumbered_labels(matrices: Sequence[SwscMatrix]) -> Tensor:
    """Labels of all rows, counted through the centroids of all matrices, int32 [sum of m]."""
    labels, first = [], 0
    for matrix in matrices:
        labels.append(matrix.indices().reshape(-1) + first)
        first += matrix.n_clusters
    return torch.cat(labels)


def _fused_scales(matrices: Sequence[SwscMatrix]) -> Tensor | None:
    """Scales of all rows, [sum of m], 1 for a matrix without scales; None if no matrix has scales."""
    if all(matrix.scales is None for matrix in matrices):
        return None
    like = matrices[0].centroids.data
    scales = [like.new_ones(matrix.layout.m) if matrix.scales is None else matrix.scales for matrix in matrices]
    return torch.cat(scales)
