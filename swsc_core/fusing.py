"""Matrices that see the same input, as one matrix: q, k and v, or gate and up.

Of whole output channels the product with the centroids is all there is to multiply, so a single product with the centroids of
all of them serves, and labels count through. Their compensations become one as well: the right factors stand one above the
other, the left ones block by block, which is a few zeros more for two products instead of six.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swsc_core.bits import label_bits
from swsc_core.codec import matrix_of
from swsc_core.layout import Layout
from swsc_core.matrix import SwscMatrix
from swsc_core.packing import pack
from swsc_core.slicing import Stored, stored_as
from swsc_core.spec import MAX_CLUSTERS
from swsc_core.values import Values


def can_fuse(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the matrices of `entries`, of one width, share whole output channels, have plain values, and fit into one."""
    if any(entry["method"] != "swsc" or not entry["n_clusters"] for entry in entries):
        return False
    m, n = sum(entry["shape"][0] for entry in entries), entries[0]["shape"][1]
    kinds = {
        (e["channel_axis"], e["segment_size"], e["codebooks"], e["centroid_bits"], e["factor_bits"]) for e in entries
    }
    fits = sum(entry["n_clusters"] for entry in entries) <= MAX_CLUSTERS
    return kinds == {("output", n, 1, None, None)} and fits and sum(entry["rank"] for entry in entries) <= min(m, n)


def fuse(stored: Sequence[Stored]) -> Stored:
    """Parts and entry of the matrices one above the other, [sum of m, n]; of matrices that `can_fuse`."""
    if len(stored) == 1:
        return stored[0]
    matrices = [matrix_of(parts, entry) for parts, entry in stored]
    n, m = matrices[0].layout.n, sum(matrix.layout.m for matrix in matrices)
    centroids = torch.cat([matrix.centroids.data for matrix in matrices])
    left, right = (torch.block_diag(*[x.left.data for x in matrices]), torch.cat([x.right.data for x in matrices]))
    fused = replace(
        matrices[0],
        layout=Layout(m, n, "output", n),
        centroids=_values(centroids),
        labels=pack(_labels(matrices), label_bits(len(centroids))),
        scales=_scales(matrices),
        left=_values(left),
        right=_values(right),
    )
    return stored_as(fused, stored[0][1])


def _values(data: Tensor) -> Values:
    return Values((data.shape[0], data.shape[1]), data)


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
