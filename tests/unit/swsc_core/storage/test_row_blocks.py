"""Claims about rows of fused matrices: they partition a matrix, and pieces are put back where they came from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swsc_core.storage.row_blocks import (
    RowBlocks,
    apply_view,
    fuse_rows,
    remaining_rows,
    require_partition,
    row_permutation,
)


@given(heads=st.integers(1, 4), head=st.integers(1, 3), pieces=st.integers(1, 3), unused=st.integers(0, 3))
def test_interleaved_pieces_and_remaining_rows_are_the_fused_matrix(
    heads: int, head: int, pieces: int, unused: int
) -> None:
    stride = pieces * head
    blocks = [RowBlocks(piece * head, head, stride, heads) for piece in range(pieces)]
    matrix = torch.arange(heads * stride + unused, dtype=torch.float32)[:, None] * torch.ones(1, 2)
    remaining = matrix[remaining_rows(len(matrix), blocks)]
    assert len(remaining) == unused
    assert torch.equal(fuse_rows(remaining, blocks, [piece.take(matrix) for piece in blocks]), matrix)
    concatenated = torch.cat([*(piece.take(matrix) for piece in blocks), remaining])
    assert torch.equal(concatenated[row_permutation(len(matrix), blocks)], matrix)


@pytest.mark.parametrize(
    ("remaining", "pieces"),
    [
        (0, [RowBlocks(0, 2, 2, 1), RowBlocks(1, 2, 2, 1)]),
        (0, [RowBlocks(1, 2, 2, 1)]),
        (1, [RowBlocks(0, 0, 1, 1)]),
        (1, [RowBlocks(0, 2, 1, 2)]),
    ],
    ids=["overlap", "exceeds", "empty", "overlaps itself"],
)
def test_what_is_no_partition_is_refused(remaining: int, pieces: list[RowBlocks]) -> None:
    with pytest.raises(ValueError, match="fused matrix"):
        require_partition(remaining, pieces)


def test_a_view_transposes_and_then_takes_rows() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(apply_view(tensor, transposed=True, row_blocks=RowBlocks(1, 1, 1, 2)), tensor.T[1:])
    assert apply_view(tensor) is tensor
