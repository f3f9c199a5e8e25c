"""The rows or columns of a compressed matrix that one rank of a tensor parallel layer works with, compressed as well.

Column-parallel layers split output rows, row-parallel ones input columns. Along whole channels a slice shortens the centroids;
across channels it takes labels, and the centroids that they name. Segments that a split would cut are cut everywhere into
pieces with a label each: nothing is lost, but such a slice is larger than its share. Labels and codes that do not begin at a
byte are packed anew. Values of few bits share scales in groups that a slice does not keep: they become plain values.
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


def rows_of(matrix: SwscMatrix, first: int, last: int) -> SwscMatrix:
    """Rows `first` to `last` of the matrix."""
    layout = matrix.layout
    if (first, last) == (0, layout.m):
        return matrix
    if layout.row_step == layout.m and layout.channel_axis == "input":
        to = Layout(last - first, layout.n, "input", last - first)
        shared = replace(matrix, layout=to, centroids=_columns(matrix.centroids, first, last))
    else:
        finer = _cut(matrix, layout.row_step, gcd(layout.row_step, first, last))
        to = replace(finer.layout, m=last - first)
        step = to.row_step
        shared = _relabelled(finer, to, finer.indices()[first // step : last // step], first // step)
    scales = None if matrix.scales is None else matrix.scales[first:last]
    return _with_factors(shared, scales, _columns(matrix.left, first, last), _plain(matrix.right))


def columns_of(matrix: SwscMatrix, first: int, last: int) -> SwscMatrix:
    """Columns `first` to `last` of the matrix."""
    layout = matrix.layout
    if (first, last) == (0, layout.n):
        return matrix
    if layout.width == layout.n and layout.channel_axis == "output":
        to = Layout(layout.m, last - first, "output", last - first)
        shared = replace(matrix, layout=to, centroids=_columns(matrix.centroids, first, last))
    else:
        finer = _cut(matrix, layout.width, gcd(layout.width, first, last))
        to = replace(finer.layout, n=last - first)
        shared = _relabelled(finer, to, finer.indices()[:, first // to.width : last // to.width], 0)
    return _with_factors(shared, matrix.scales, _plain(matrix.left), _columns(matrix.right, first, last))


def _cut(matrix: SwscMatrix, size: int, to: int) -> SwscMatrix:
    """Segments, which span `size` of what is split, cut into pieces of `to`: each centroid becomes size / to of them."""
    pieces = size // to
    if pieces == 1:
        return matrix
    indices, layout = matrix.indices() * pieces, replace(matrix.layout, size=to)
    along = torch.arange(pieces, dtype=indices.dtype, device=indices.device)
    if layout.channel_axis == "output":
        indices = (indices[:, :, None] + along).flatten(1)
    else:
        indices = (indices[:, None, :] + along[:, None]).flatten(0, 1)
    data = _plain(matrix.centroids).data.reshape(-1, to)
    k = matrix.n_clusters * pieces
    labels = indices % k if k else indices
    centroids = StoredValues((data.shape[0], to), data)
    return replace(matrix, layout=layout, centroids=centroids, labels=pack(labels.reshape(-1), label_bits(k)))


def _relabelled(matrix: SwscMatrix, layout: Layout, indices: Tensor, first_row: int) -> SwscMatrix:
    """The matrix of `layout` whose segments are the centroids `indices` of `matrix`, from row `first_row` of its grid on.

    Codebooks are kept where the slice has them whole, and segments for their centroids; else one takes those that are used.
    """
    rows_a_book, k = matrix.layout.grid[0] // matrix.codebooks, matrix.n_clusters
    books, rest = divmod(len(indices), rows_a_book)
    if not k:
        return replace(matrix, layout=layout, codebooks=1)
    whole = not rest and not first_row % rows_a_book and k * books <= layout.count and not matrix.shares_whole_channels
    if whole:
        start = first_row // rows_a_book * k
        kept = matrix.centroids if books == matrix.codebooks else _rows(matrix.centroids, start, start + books * k)
        labels = pack((indices % k).reshape(-1), label_bits(k))
        return replace(matrix, layout=layout, codebooks=books, centroids=kept, labels=labels)
    used, labels = torch.unique(indices, return_inverse=True)
    data = _plain(matrix.centroids).data[used]
    packed = pack(labels.reshape(-1), label_bits(len(used)))
    return replace(
        matrix, layout=layout, codebooks=1, centroids=StoredValues((len(used), layout.size), data), labels=packed
    )


def _with_factors(matrix: SwscMatrix, scales: Tensor | None, left: StoredValues, right: StoredValues) -> SwscMatrix:
    """`matrix` with these; more factors than it has rows or columns are multiplied out, which says the same with fewer."""
    m, n = matrix.layout.m, matrix.layout.n
    if left.shape[0] > min(m, n):
        dense = (left.data.float().T @ right.data.float()).to(left.data.dtype)
        one = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
        pair = (one, dense) if m <= n else (dense.T.contiguous(), one)
        left, right = (StoredValues((side.shape[0], side.shape[1]), side) for side in pair)
    return replace(matrix, scales=scales, left=left, right=right)


def _plain(values: StoredValues) -> StoredValues:
    return values if values.scales is None else StoredValues(values.shape, values.expand(values.scales.dtype))


def _rows(values: StoredValues, first: int, last: int) -> StoredValues:
    return StoredValues((last - first, values.shape[1]), _plain(values).data[first:last])


def _columns(values: StoredValues, first: int, last: int) -> StoredValues:
    return StoredValues((values.shape[0], last - first), _plain(values).data[:, first:last].contiguous())
