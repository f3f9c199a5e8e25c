"""Slices of rows or columns of a round-to-nearest matrix, as matrices of their own.

Codes that do not begin at a byte are packed again. If a slice begins within a group, groups are cut into smaller
groups.
"""

from dataclasses import replace
from math import gcd

import torch

from swsc_core.method.rtn import RtnMatrix, group_count
from swsc_core.storage.packing import pack, packed_slice, unpack


def rtn_rows(matrix: RtnMatrix, first: int, last: int) -> RtnMatrix:
    """Rows `first` to `last` of the matrix."""
    (m, n), bits = matrix.shape, matrix.bits
    codes = packed_slice(matrix.codes, bits, first * n, last * n, m * n)
    if matrix.group_size == m * n:
        return replace(matrix, shape=(last - first, n), group_size=(last - first) * n, codes=codes)
    groups = group_count(matrix.shape, matrix.group_size) // m
    scales = matrix.scales[first * groups : last * groups]
    zeros = matrix.zero_points
    if not matrix.symmetric:
        zeros = packed_slice(zeros, bits, first * groups, last * groups, m * groups)
    return replace(matrix, shape=(last - first, n), codes=codes, scales=scales, zero_points=zeros)


def rtn_columns(matrix: RtnMatrix, first: int, last: int) -> RtnMatrix:
    """Columns `first` to `last`. If the slice begins within a group, its groups are smaller and scales are repeated."""
    (m, n), bits, width = matrix.shape, matrix.bits, last - first
    if width == n:
        return matrix
    codes = pack(unpack(matrix.codes, bits, m * n).reshape(m, n)[:, first:last].reshape(-1), bits)
    if matrix.group_size == m * n:
        return replace(matrix, shape=(m, width), group_size=m * width, codes=codes)
    is_within_group = first // matrix.group_size == (last - 1) // matrix.group_size
    size = width if is_within_group else gcd(matrix.group_size, first)
    groups = (first + torch.arange(0, width, size, device=codes.device)) // matrix.group_size
    scales = matrix.scales.reshape(m, -1)[:, groups].reshape(-1)
    zeros = matrix.zero_points
    if not matrix.symmetric:
        zeros = pack(unpack(zeros, bits, matrix.scales.numel()).reshape(m, -1)[:, groups].reshape(-1), bits)
    return replace(matrix, shape=(m, width), group_size=size, codes=codes, scales=scales, zero_points=zeros)
