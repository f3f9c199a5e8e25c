"""Slices of rows or columns of a compressed matrix, for the ranks of a tensor parallel layer.

Column-parallel layers split output rows, row-parallel layers split input columns. A slice along whole channels shortens
the centroids. A slice across channels selects labels, and the centroids that they name. If a split would cut segments,
all segments are cut into pieces with a label each: this is exact, but the slice is larger than its share. Labels that
do not begin at a byte are packed again. Values of few bits share scales in groups that a slice does not keep, so they
are stored as floating point values.
"""

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from swsc_core.method.segmentation import Layout
from swsc_core.method.stored_values import StoredValues
from swsc_core.method.swsc_matrix import SwscMatrix
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import pack


def slice_rows(matrix: SwscMatrix, first: int, last: int) -> SwscMatrix:
    """Rows `first` to `last` of the matrix."""
    layout = matrix.layout
    if (first, last) == (0, layout.m):
        return matrix
    if layout.row_step == layout.m and layout.channel_axis == "input":
        sliced_layout = Layout(last - first, layout.n, "input", last - first)
        clustered = replace(matrix, layout=sliced_layout, centroids=_columns(matrix.centroids, first, last))
    else:
        finer = _cut_segments(matrix, layout.row_step, gcd(layout.row_step, first, last))
        sliced_layout, step = replace(finer.layout, m=last - first), finer.layout.row_step
        clustered = _relabelled(finer, sliced_layout, finer.indices()[first // step : last // step], first // step)
    scales = None if matrix.scales is None else matrix.scales[first:last]
    return _with_factors(clustered, scales, _columns(matrix.left, first, last), _floating_point(matrix.right))


def slice_columns(matrix: SwscMatrix, first: int, last: int) -> SwscMatrix:
    """Columns `first` to `last` of the matrix."""
    layout = matrix.layout
    if (first, last) == (0, layout.n):
        return matrix
    if layout.width == layout.n and layout.channel_axis == "output":
        sliced_layout = Layout(layout.m, last - first, "output", last - first)
        clustered = replace(matrix, layout=sliced_layout, centroids=_columns(matrix.centroids, first, last))
    else:
        finer = _cut_segments(matrix, layout.width, gcd(layout.width, first, last))
        sliced_layout, width = replace(finer.layout, n=last - first), finer.layout.width
        clustered = _relabelled(finer, sliced_layout, finer.indices()[:, first // width : last // width], 0)
    return _with_factors(clustered, matrix.scales, _floating_point(matrix.left), _columns(matrix.right, first, last))


def _cut_segments(matrix: SwscMatrix, size: int, piece_size: int) -> SwscMatrix:
    """The same matrix with segments of `piece_size` in place of `size` rows or columns; centroids are cut, too."""
    pieces = size // piece_size
    if pieces == 1:
        return matrix
    indices, layout = matrix.indices() * pieces, replace(matrix.layout, size=piece_size)
    along = torch.arange(pieces, dtype=indices.dtype, device=indices.device)
    if layout.channel_axis == "output":
        indices = (indices[:, :, None] + along).flatten(1)
    else:
        indices = (indices[:, None, :] + along[:, None]).flatten(0, 1)
    data = _floating_point(matrix.centroids).data.reshape(-1, piece_size)
    k = matrix.n_clusters * pieces
    labels = indices % k if k else indices
    centroids = StoredValues((data.shape[0], piece_size), data)
    return replace(matrix, layout=layout, centroids=centroids, labels=pack(labels.reshape(-1), label_bits(k)))


def _relabelled(matrix: SwscMatrix, layout: Layout, indices: Tensor, first_row: int) -> SwscMatrix:
    """The matrix of `layout` whose segments are the centroids `indices` of `matrix`.

    Codebooks are kept if the slice contains all rows of each and has enough segments. Otherwise the slice has one
    codebook, of the centroids that occur in it.

    Args:
        indices: row of the centroids of `matrix` of each segment, int32 [rows of the grid, blocks].
        first_row: row of the grid of `matrix` where the slice begins.
    """
    rows_per_codebook, k = matrix.layout.grid[0] // matrix.codebooks, matrix.n_clusters
    if not k:
        return replace(matrix, layout=layout, codebooks=1)
    codebooks, remaining_rows = divmod(len(indices), rows_per_codebook)
    is_aligned = not remaining_rows and not first_row % rows_per_codebook
    if is_aligned and k * codebooks <= layout.count and not matrix.shares_whole_channels:
        start, centroids = first_row // rows_per_codebook * k, matrix.centroids
        if codebooks < matrix.codebooks:
            centroids = _rows(centroids, start, start + codebooks * k)
        labels = pack((indices % k).reshape(-1), label_bits(k))
        return replace(matrix, layout=layout, codebooks=codebooks, centroids=centroids, labels=labels)
    used, labels = torch.unique(indices, return_inverse=True)
    centroids = StoredValues((len(used), layout.size), _floating_point(matrix.centroids).data[used])
    labels = pack(labels.reshape(-1), label_bits(len(used)))
    return replace(matrix, layout=layout, codebooks=1, centroids=centroids, labels=labels)


def _with_factors(matrix: SwscMatrix, scales: Tensor | None, left: StoredValues, right: StoredValues) -> SwscMatrix:
    """`matrix` with these scales and factors; the factors are multiplied if their rank is above its smaller side."""
    m, n = matrix.layout.m, matrix.layout.n
    if left.shape[0] > min(m, n):
        dense = (left.data.float().T @ right.data.float()).to(left.data.dtype)
        identity = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
        factors = (identity, dense) if m <= n else (dense.T.contiguous(), identity)
        left, right = (StoredValues((factor.shape[0], factor.shape[1]), factor) for factor in factors)
    return replace(matrix, scales=scales, left=left, right=right)


def _floating_point(values: StoredValues) -> StoredValues:
    """The values as floating point values, in the dtype of their scales if they are stored as codes."""
    return values if values.scales is None else StoredValues(values.shape, values.expand(values.scales.dtype))


def _rows(values: StoredValues, first: int, last: int) -> StoredValues:
    return StoredValues((last - first, values.shape[1]), _floating_point(values).data[first:last])


def _columns(values: StoredValues, first: int, last: int) -> StoredValues:
    return StoredValues((values.shape[0], last - first), _floating_point(values).data[:, first:last].contiguous())
