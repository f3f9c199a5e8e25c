"""Partition of a model into blocks."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.blocks.block import partition

SIZES = st.lists(st.integers(1, 20), min_size=3, max_size=12)
ROOMS = st.integers(1, 60)


def fits(sizes: Sequence[int], room: int) -> bool:
    """Whether a block of units of these sizes is allowed: it fits, or it is one unit."""
    return len(sizes) == 1 or sum(sizes) <= room


def fewest(sizes: Sequence[int], room: int) -> int:
    """The smallest number of blocks, by dynamic programming over all partitions."""
    best = [0]
    for stop in range(1, len(sizes) + 1):
        best.append(min(1 + best[start] for start in range(stop) if fits(sizes[start:stop], room)))
    return best[-1]


@given(SIZES, ROOMS)
def test_blocks_cover_all_units_in_order_and_fit(sizes: list[int], room: int) -> None:
    blocks = partition(sizes, room)
    assert [unit for block in blocks for unit in block.units] == list(range(len(sizes)))
    assert all(fits([sizes[unit] for unit in block.units], room) for block in blocks)


@given(SIZES, ROOMS)
def test_blocks_cover_all_layers_in_order(sizes: list[int], room: int) -> None:
    blocks = partition(sizes, room)
    n_layers = len(sizes) - 2
    assert [layer for block in blocks for layer in block.layers] == list(range(n_layers))
    assert {block.n_layers for block in blocks} == {n_layers}
    assert all(before.stop == after.start for before, after in pairwise(blocks))


@given(SIZES, ROOMS)
def test_there_are_as_few_blocks_as_possible(sizes: list[int], room: int) -> None:
    assert len(partition(sizes, room)) == fewest(sizes, room)


@given(SIZES, ROOMS)
def test_only_the_first_block_embeds_and_only_the_last_one_predicts(sizes: list[int], room: int) -> None:
    blocks = partition(sizes, room)
    assert [block.is_first for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [block.is_last for block in blocks] == [False] * (len(blocks) - 1) + [True]


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([5, 10, 10, 10, 5], 25, ["embedding and layers 0 to 1", "layers 2 to 2 and head"]),
        ([30, 10, 10, 30], 30, ["embedding", "layers 0 to 1", "head"]),
        ([1, 1, 1], 3, ["embedding and layers 0 to 0 and head"]),
        ([80 << 30] * 3, 1 << 30, ["embedding", "layers 0 to 0", "head"]),
    ],
    ids=["small ends", "large ends", "whole", "units that are larger than the room"],
)
def test_examples(sizes: list[int], room: int, expected: list[str]) -> None:
    assert [str(block) for block in partition(sizes, room)] == expected
