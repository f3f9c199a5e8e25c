"""The slices of all ranks make up the matrix, and interleaved heads are put into the order of an engine's layer."""

import pytest
import torch

from swsc_core.serving.shard_slices import EmbeddingShard, LinearShard
from swsc_core.storage.row_blocks import RowBlocks

# four heads of 16 rows for queries, two for keys and two for values
Q_ROWS, KV_ROWS, COLUMNS = 64, 32, 48
SHAPE = (Q_ROWS + 2 * KV_ROWS, COLUMNS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_slices_of_all_ranks_are_the_matrix(ranks: int) -> None:
    sizes = [Q_ROWS // ranks, KV_ROWS // ranks, KV_ROWS // ranks]
    rows: list[int] = []
    for rank in range(ranks):
        for (first, last), columns in LinearShard(COLUMNS, rank, ranks).slices("qkv", sizes, SHAPE):
            rows += range(first, last)
            assert columns == (0, COLUMNS)
    assert sorted(rows) == list(range(SHAPE[0]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_column_slices_of_all_ranks_are_the_matrix(ranks: int) -> None:
    width = COLUMNS // ranks
    columns: list[int] = []
    for rank in range(ranks):
        (((first_row, last_row), (first, last)),) = LinearShard(width, rank, ranks).slices("o", [64], (64, COLUMNS))
        assert (first_row, last_row) == (0, 64)
        columns += range(first, last)
    assert columns == list(range(COLUMNS))


def test_key_value_heads_fewer_than_ranks_are_repeated() -> None:
    slices = [LinearShard(COLUMNS, rank, 4).slices("qkv", [16, 16, 16], SHAPE) for rank in range(4)]
    assert [rows for (rows, _), _, _ in slices] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert [rows for _, (rows, _), _ in slices] == [(64, 80), (64, 80), (80, 96), (80, 96)]


@pytest.mark.parametrize(("width", "sizes"), [(COLUMNS, [30, 15, 15]), (9, [64, 32, 32])])
def test_a_matrix_that_does_not_divide_is_named(width: int, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"qkv: .*128×48"):
        LinearShard(width, 0, 2).slices("qkv", sizes, SHAPE)


def test_rows_interleaved_by_group_are_put_in_order() -> None:
    pieces = {"q": RowBlocks(0, 32, 64, 2), "k": RowBlocks(32, 16, 64, 2), "v": RowBlocks(48, 16, 64, 2)}
    order = LinearShard(COLUMNS, 0, 1).row_order("qkv", [64, 32, 32], SHAPE, pieces)
    groups = [(group, offset) for group in range(2) for offset in range(64)]
    expected = [
        64 * group + offset
        for first, last in ((0, 32), (32, 48), (48, 64))
        for group, offset in groups
        if first <= offset < last
    ]
    assert order.tolist() == expected


def test_concatenated_pieces_keep_their_order() -> None:
    pieces = {"q": RowBlocks(0, 64, 128, 1), "k": RowBlocks(64, 32, 128, 1)}
    assert torch.equal(LinearShard(COLUMNS, 0, 1).row_order("qkv", [64, 32, 32], SHAPE, pieces), torch.arange(128))


def test_an_embedding_shard_has_its_rows_and_all_columns() -> None:
    assert EmbeddingShard(10, 20).slices("embed", [], (100, COLUMNS)) == [((10, 20), (0, COLUMNS))]
