"""Decides whether a model is loaded whole by each worker or in blocks, and into which blocks it is cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.blocks.block import Block, partition
from pipeline.blocks.layered_model import LayeredModel
from pipeline.blocks.skeleton import Skeleton
from pipeline.blocks.twin import require_blocks
from pipeline.engine.memory import GPU, Room, WorkerMemory
from pipeline.errors import BlocksUnsupported, ClusterError
from pipeline.models.loading import ModelKey, arithmetic_dtype, meta_model
from pipeline.models.stored_model import Model
from swsc_core.storage.location import MatrixLocation


@dataclass(frozen=True)
class BlockLayout:
    """A model in blocks.

    Attributes:
        blocks: the blocks, in their order.
        tuple_length: length of the tuple that its layers return, see `LayeredModel`.
        weights: what a worker holds of the weights at most: those of one block, and the stored ones of the next.
    """

    blocks: tuple[Block, ...]
    tuple_length: int
    weights: WorkerMemory


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of the units of a model: its embedding, each decoder layer, its head.

    Attributes:
        values: of the parameters of each unit, in the dtype of the computation.
        stored: of the tensors that they are read from.
        fused: largest parameter that is assembled from several tensors; there are three copies of it meanwhile.
        numbers: stored tensor -> number of the unit that it is loaded into; a tied embedding is part of the head, too.
    """

    values: tuple[int, ...]
    stored: tuple[int, ...]
    fused: int
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, source: Model, key: ModelKey, kind: str) -> "LayerSizes":
        """Sizes of a model on a device of `kind`, from the headers of its files. This process may have no such device.

        Raises:
            BlocksUnsupported: the model has no list of decoder layers.
        """
        dtype = arithmetic_dtype(source, key, meta_model(key).config, kind)
        skeleton = Skeleton(source, replace(key, dtype=dtype), "cpu")
        layered = LayeredModel(skeleton)
        n_layers = len(layered.layers)
        names = [layered.parameters_of(Block(layer, layer + 1, n_layers)) for layer in range(n_layers)]
        embedding, head = layered.end_parameters
        units = [embedding, *names, head]
        values = tuple(_value_bytes(skeleton.model, unit) for unit in units)
        fused = [name for unit in units for name in unit if len(skeleton.stored_names([name])) > 1]
        largest_fused = max((_value_bytes(skeleton.model, [name]) for name in fused), default=0)
        numbers = {stored: number for number, unit in enumerate(units) for stored in skeleton.stored_names(unit)}
        return cls(values, tuple(map(skeleton.nbytes, units)), largest_fused, numbers)

    def unit_of(self, name: str, location: MatrixLocation, model: str) -> int:
        """Number of the unit that a matrix is loaded into.

        Args:
            name, location: the matrix.
            model: location of the model, for messages.

        Raises:
            BlocksUnsupported: the matrix is neither in a layer nor the embedding or the head.
        """
        unit = self.numbers.get(location.tensor or name)
        if unit is None:
            raise BlocksUnsupported(
                f"{model}: {name} is in no decoder layer, so it cannot be calibrated or tuned in blocks; exclude it"
                " with --exclude, or use workers that hold the whole model"
            )
        return unit

    def plus(self, nbytes: Mapping[int, int]) -> "LayerSizes":
        """These sizes with further bytes on the device for some units."""
        return replace(self, values=tuple(size + nbytes.get(unit, 0) for unit, size in enumerate(self.values)))

    def held(self, kind: str) -> list[int]:
        """Bytes of each unit that count towards the memory of a worker on a device of `kind`.

        The stored tensors of the next block are read ahead into host memory.
        """
        if kind == GPU:
            return list(self.values)
        return [values + stored for values, stored in zip(self.values, self.stored, strict=True)]

    def memory(self, blocks: Sequence[Block]) -> WorkerMemory:
        """What a worker holds of the weights at most."""
        assembling = 2 * self.fused
        return WorkerMemory(
            cpu=assembling + _largest(blocks, self.held("cpu")),
            host=_largest(blocks, self.stored),
            device=assembling + _largest(blocks, self.values),
        )

    def at_least(self, other: "LayerSizes") -> "LayerSizes":
        """These sizes, or those of another model with the same units where they are larger."""
        values, stored = (
            tuple(map(max, mine, theirs)) for mine, theirs in ((self.values, other.values), (self.stored, other.stored))
        )
        return replace(self, values=values, stored=stored, fused=max(self.fused, other.fused))


def layout_within(room: Room, key: ModelKey, sizes: LayerSizes, working: WorkerMemory) -> BlockLayout:
    """The fewest blocks that fit a worker.

    Args:
        room: what a worker may hold.
        key: how the model is loaded.
        sizes: of its layers.
        working: what a worker needs besides a block.

    Raises:
        ClusterError: not even the largest layer fits.
        BlocksUnsupported: more than hidden states travels between the layers of the model.
    """
    held, besides = sizes.held(room.kind), working.limited(room.kind) + 2 * sizes.fused
    if max(held) + besides > room.nbytes:
        raise ClusterError(
            f"{key.location}: a worker may hold {room.nbytes / 1e9:.1f} GB, but the largest layer needs"
            f" {(max(held) + besides) / 1e9:.1f} GB with a batch; raise --memory-per-worker, use larger workers, or"
            " shorter windows or a smaller --batch-size"
        )
    blocks = partition(held, room.nbytes - besides)
    model = meta_model(key)
    tuple_length = require_blocks(type(model), model.config, blocks, key.location)
    return BlockLayout(blocks, tuple_length, sizes.memory(blocks))


def _largest(blocks: Sequence[Block], sizes: Sequence[int]) -> int:
    return max(sum(sizes[unit] for unit in block.units) for block in blocks)


def _value_bytes(model: torch.nn.Module, names: Sequence[str]) -> int:
    tensors = (model.get_parameter_or_buffer(name) for name in names)  # type: ignore[operator]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
