"""The stored tensors of one layer of an engine, from the first that comes to a rank's slices of them.

An engine fuses what a checkpoint keeps apart (q, k and v; gate and up), and each of its ranks computes a slice. Tensors come in
any order and whole. As soon as a matrix is complete its slice is cut and the rest let go, so that a rank never holds more than
its slices and what it is just reading.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.compressed.codec import require_part_shapes
from swsc_core.compressed.compressed_matrix import CompressedMatrix, Range
from swsc_core.compressed.config_json import CompressedTensor
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import matrix_of
from swsc_core.serving.fused_slices import Cuts, slice_fused
from swsc_core.serving.shard_slices import EmbeddingShard, LinearShard

_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # what engines call the tensors of a fused layer, when not by number
REMEDY = "`swsc verify DIR` names the file"


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint, and the rows of it that a rank holds.

    Attributes:
        name: without ".weight".
        compressed: how it is stored; None: dense.
        sizes: rows of the rank's slices of it, where an engine names these.
    """

    name: str
    compressed: CompressedTensor | None = None
    sizes: tuple[int, ...] = ()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """name of a part -> entry, as of `CompressedTensor`; none if it is dense."""
        return self.compressed.entries if self.compressed else {}

    @property
    def is_fused(self) -> bool:
        """Whether parts of it are compressed."""
        return self.compressed is not None and self.compressed.is_fused

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """What it is stored as ("labels", or "q.labels" of a piece) -> the dtype that it is likely stored in."""
        rest = {} if "" in self.entries else {"weight": torch.get_default_dtype()}
        return rest | {
            f"{piece}.{part}" if piece else part: entry.torch_dtype if is_float else torch.uint8
            for piece, entry in self.entries.items()
            for part, (_, is_float) in entry.part_shapes().items()
        }

    def as_stored(self, part: str, tensor: Tensor) -> Tensor:
        """A tensor as it is stored: vLLM's GPT-2 transposes whatever is called weight, as dense tensors of it need it."""
        piece, _, last = part.rpartition(".")
        if self.compressed is None or not self.compressed.location.transposed or last != "weight" or tensor.ndim != 2:
            return tensor
        entry = self.entries.get(piece) or next(iter(self.entries.values()))
        columns = entry.part_shapes()["weight"].shape[-1] if piece in self.entries else entry.shape[1]
        return tensor.T if tensor.shape[1] != columns or not tensor.is_contiguous() else tensor


class Loading:
    """Takes the tensors of `sources`, and keeps the slices of each that belong to the rank's `shard`."""

    def __init__(
        self, sources: Sequence[CheckpointTensor], shard: LinearShard | EmbeddingShard, dtype: torch.dtype
    ) -> None:
        self.sources, self.shard, self.dtype = sources, shard, dtype
        self._arrived: list[dict[str, Tensor]] = [{} for _ in sources]
        self._cuts: dict[int, Cuts] = {}

    def parts(self) -> dict[str, torch.dtype]:
        """Names of the tensors that come, as the engine sees them, with a dtype."""
        return {part: dtype for source in reversed(self.sources) for part, dtype in source.parts.items()}

    def take(self, part: str, tensor: Tensor, shard: str | int | None, device: torch.device) -> None:
        """A tensor has come; ValueError, naming it, if it does not belong there."""
        number = shard if isinstance(shard, int) else _SHARDS[shard]
        source, arrived = self.sources[number], self._arrived[number]
        if part not in source.parts:
            raise ValueError(f"{source.name}.{part}: config.json knows no such part; {REMEDY}")
        tensor = source.as_stored(part, tensor)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        # the engine may use its buffer again
        arrived[part] = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if arrived.keys() == source.parts.keys():
            self._cuts[number] = self._cut(source, arrived)
            arrived.clear()

    def _cut(self, source: CheckpointTensor, parts: dict[str, Tensor]) -> Cuts:
        if source.is_fused:
            return self._cut_fused(source, parts)
        entry = source.entries.get("")
        if entry is None:
            return self._cut_dense(source, parts["weight"]), None
        require_whole(source.name, parts, entry)
        ranges = self.shard.slices(source.name, source.sizes, entry.shape)
        return [_slice(source.name, parts, entry, *one) for one in ranges], None

    def _cut_dense(self, source: CheckpointTensor, weight: Tensor) -> list[CompressedMatrix | Tensor]:
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"{source.name}: {list(weight.shape)} is no dense matrix, and config.json has no entry")
        ranges = self.shard.slices(source.name, source.sizes, (weight.shape[0], weight.shape[1]))
        return [weight[slice(*rows), slice(*columns)].clone() for rows, columns in ranges]

    def _cut_fused(self, source: CheckpointTensor, parts: dict[str, Tensor]) -> Cuts:
        own = {
            piece: {part: parts[f"{piece}.{part}"] for part in e.part_shapes()} for piece, e in source.entries.items()
        }
        for piece, entry in source.entries.items():
            require_whole(f"{source.name}.{piece}", own[piece], entry)

        def cut(piece: str, rows: Range, columns: Range) -> CompressedMatrix:
            return _slice(f"{source.name}.{piece}", own[piece], source.entries[piece], rows, columns)

        assert isinstance(self.shard, LinearShard)
        return slice_fused(source.name, source.sizes, source.entries, parts["weight"], self.shard, cut)

    def cuts(self) -> Cuts:
        """The rank's slices of all sources, and the order of their rows; ValueError, naming what has not come."""
        slices: list[CompressedMatrix | Tensor] = []
        orders, before = [], 0
        for number, source in enumerate(self.sources):
            if number not in self._cuts:
                missing = [f"{source.name}.{part}" for part in source.parts if part not in self._arrived[number]]
                raise ValueError(f"not in the checkpoint: {', '.join(missing)}; {REMEDY}")
            own, order = self._cuts[number]
            rows = sum(len(cut) if isinstance(cut, Tensor) else cut.entry.shape[0] for cut in own)
            slices += own
            orders.append(before + (torch.arange(rows) if order is None else order))
            before += rows
        in_order = all(order is None for _, order in self._cuts.values())
        return slices, None if in_order else torch.cat(orders).to(_device(slices[0]))


def _device(cut: CompressedMatrix | Tensor) -> torch.device:
    return cut.device if isinstance(cut, Tensor) else next(iter(cut.tensors.values())).device


def _slice(name: str, parts: Mapping[str, Tensor], entry: Entry, rows: Range, columns: Range) -> CompressedMatrix:
    try:
        cut = matrix_of(parts, entry).slice(rows, columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; use fewer ranks, or `swsc restore` first") from error
    return matrix_of(
        {part: tensor.clone() for part, tensor in cut.tensors.items()}, cut.entry
    )  # a view would keep all of it


def require_whole(name: str, parts: Mapping[str, Tensor], entry: Entry) -> None:
    """Raise ValueError, naming the tensor, unless `parts` are what `entry` says, labels in range."""
    try:
        require_part_shapes(parts, entry)
    except ValueError as error:
        raise ValueError(f"{name}.{error}; {REMEDY}") from error
    try:
        matrix_of(parts, entry).require_valid()
    except ValueError as error:
        raise ValueError(f"{name}.labels: {error}; {REMEDY}") from error
