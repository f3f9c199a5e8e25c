"""Blocks: runs of consecutive decoder layers, and the partition of a model into them.

The units of a model are its embedding, its decoder layers and its head, numbered from 0. Embedding and head of a model
with a large vocabulary may be larger than many layers, so that they may need blocks of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """The decoder layers `start` <= i < `stop` of a model of `n_layers`.

    Attributes:
        embeds: a block that starts with the first layer also embeds the tokens.
        predicts: a block that ends with the last layer also predicts the next tokens.
    """

    start: int
    stop: int
    n_layers: int
    embeds: bool = True
    predicts: bool = True

    @property
    def is_first(self) -> bool:
        """Whether the input of the block is token ids alone."""
        return self.start == 0 and self.embeds

    @property
    def is_last(self) -> bool:
        """Whether the output of the block is logits."""
        return self.stop == self.n_layers and self.predicts

    @property
    def layers(self) -> range:
        """Numbers of the layers of the block, from 0."""
        return range(self.start, self.stop)

    @property
    def units(self) -> range:
        """Numbers of the units of the block."""
        return range(self.start + (not self.is_first), self.stop + 1 + self.is_last)

    @property
    def without_head(self) -> "Block":
        """The same units except the head."""
        return replace(self, predicts=False)

    @property
    def head(self) -> "Block":
        """The head of the model as a block of its own."""
        return Block(self.n_layers, self.n_layers, self.n_layers, embeds=False)

    def __str__(self) -> str:
        """Describe the block."""
        names = [f"layers {self.start} to {self.stop - 1}"] if self.layers else []
        return " and ".join(["embedding"] * self.is_first + names + ["head"] * self.is_last)


def partition(unit_bytes: Sequence[int], room: int) -> tuple[Block, ...]:
    """Cut a model into the fewest blocks that fit `room` bytes each.

    A unit that is larger than `room` gets a block of its own.

    Args:
        unit_bytes: bytes of the embedding, of each decoder layer, and of the head.
        room: bytes that a block may have.
    """
    starts: list[int] = []
    left = 0
    for unit, nbytes in enumerate(unit_bytes):
        if not starts or nbytes > left:
            starts.append(unit)
            left = room
        left -= nbytes
    n_units = len(unit_bytes)
    return tuple(_block(start, stop, n_units) for start, stop in zip(starts, [*starts[1:], n_units], strict=True))


def _block(start: int, stop: int, n_units: int) -> Block:
    """The block of the units `start` <= i < `stop`."""
    n_layers = n_units - 2
    return Block(max(start, 1) - 1, min(stop, n_units - 1) - 1, n_layers, start == 0, stop == n_units)
