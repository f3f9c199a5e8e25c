"""Stations: the passes of blocks that every shard of windows makes, in their order."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.blocks.block import Block


@dataclass(frozen=True)
class Station:
    """A pass of one block.

    Attributes:
        block: the block.
        inputs: numbers of the earlier stations whose payloads the pass needs.
        adds: the worker adds something up over the shards, which therefore pass in their order.
    """

    block: Block
    inputs: tuple[int, ...] = ()
    adds: bool = False


def forward_stations(blocks: Sequence[Block]) -> tuple[Station, ...]:
    """Stations of a forward pass."""
    return tuple(Station(block, (number - 1,) if number else ()) for number, block in enumerate(blocks))


def backward_stations(blocks: Sequence[Block], adds: bool = True) -> tuple[Station, ...]:
    """Stations of a forward pass that ends with the loss, and of the backward pass from there to the first block.

    The backward pass of a block needs the hidden states before it, and the gradient of those after it.

    Args:
        blocks: all blocks of the model.
        adds: the workers of the loss and of the backward pass add something up.
    """
    forward = forward_stations(blocks)
    last = len(blocks) - 1
    loss = Station(blocks[-1], forward[-1].inputs, adds)
    backward = [
        Station(blocks[number], (number - 1, 2 * last - number - 1) if number else (2 * last - 1,), adds)
        for number in range(last - 1, -1, -1)
    ]
    return (*forward[:-1], loss, *backward)
