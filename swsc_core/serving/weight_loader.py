"""Loading of one engine layer: from stored tensors, which arrive in any order, to a rank's slices.

An engine fuses tensors that a checkpoint stores separately (q, k and v; gate and up), and each rank computes with a
slice. Tensors arrive whole. As soon as all parts of a matrix have arrived, its slice is cut and the rest is released,
so that a rank holds no more than its slices and the matrix that it is reading.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.compressed.codec import require_part_shapes
from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.config_json import CompressedTensor
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import matrix_of
from swsc_core.serving.fused_slices import FusedMatrix
from swsc_core.serving.shard_slices import EmbeddingShard, LinearShard, RankSlices, slice_matrix

# engines identify the tensors of a fused layer by number or by these names
_SHARD_NUMBERS = {None: 0, "q": 0, "k": 1, "v": 2}
REMEDY = "`swsc verify DIR` names the file"


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint that an engine's layer is loaded from.

    Attributes:
        name: name without ".weight".
        compressed: how it is stored; None if it is dense.
        sizes: rows of the rank's slices of the tensor, one per matrix that it fuses; empty for an embedding.
    """

    name: str
    compressed: CompressedTensor | None = None
    sizes: tuple[int, ...] = ()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Name of a piece ("" for the whole tensor) -> entry; empty if the tensor is dense."""
        return self.compressed.entries if self.compressed else {}

    @property
    def is_fused(self) -> bool:
        """Whether pieces of the tensor are compressed, not the tensor as one matrix."""
        return self.compressed is not None and self.compressed.is_fused

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """Stored name of each part ("labels", or "q.labels" of a piece) -> the dtype that it is probably stored in."""
        dense = {} if "" in self.entries else {"weight": torch.get_default_dtype()}
        return dense | {
            f"{piece}.{part}" if piece else part: entry.torch_dtype if is_float else torch.uint8
            for piece, entry in self.entries.items()
            for part, (_, is_float) in entry.part_shapes().items()
        }

    def as_stored(self, part: str, tensor: Tensor) -> Tensor:
        """Undo the transpose that vLLM's GPT-2 applies to every tensor named weight, as its dense tensors need it."""
        piece, _, last = part.rpartition(".")
        if self.compressed is None or not self.compressed.location.transposed or last != "weight" or tensor.ndim != 2:
            return tensor
        entry = self.entries.get(piece) or next(iter(self.entries.values()))
        columns = entry.part_shapes()["weight"].shape[-1] if piece in self.entries else entry.shape[1]
        return tensor.T if tensor.shape[1] != columns or not tensor.is_contiguous() else tensor


class ShardLoader:
    """Collects the stored tensors of `sources` and keeps the slices that belong to the rank's `shard`.

    Args:
        sources: the tensors of the checkpoint that the layer fuses, in order.
        shard: the rank's share of the layer.
        dtype: dtype of floating point values in memory.
    """

    def __init__(
        self, sources: Sequence[CheckpointTensor], shard: LinearShard | EmbeddingShard, dtype: torch.dtype
    ) -> None:
        self.sources, self.shard, self.dtype = sources, shard, dtype
        self._arrived: list[dict[str, Tensor]] = [{} for _ in sources]
        self._slices: dict[int, RankSlices] = {}

    def parts(self) -> dict[str, torch.dtype]:
        """Names of the stored parts of all sources, which the engine sees as parameters, and their dtypes."""
        return {part: dtype for source in reversed(self.sources) for part, dtype in source.parts.items()}

    def take(self, part: str, tensor: Tensor, shard_id: str | int | None, device: torch.device) -> None:
        """Add a stored tensor, and cut the slices of its source if that is complete.

        Args:
            part: stored name of the part.
            tensor: the whole stored tensor.
            shard_id: the engine's number or name of the source; None if there is one source.
            device: device of the rank.

        Raises:
            ValueError: config.json names no such part, or the matrix is damaged or does not divide.
        """
        number = shard_id if isinstance(shard_id, int) else _SHARD_NUMBERS[shard_id]
        source, parts = self.sources[number], self._arrived[number]
        if part not in source.parts:
            raise ValueError(f"{source.name}.{part}: config.json names no such part; {REMEDY}")
        tensor = source.as_stored(part, tensor)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        # a copy, because the engine may reuse its buffer
        parts[part] = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if parts.keys() == source.parts.keys():
            self._slices[number] = self._slice(source, parts)
            parts.clear()

    def _slice(self, source: CheckpointTensor, parts: Mapping[str, Tensor]) -> RankSlices:
        if source.is_fused:
            return self._slice_fused(source, parts)
        entry = source.entries.get("")
        if entry is None:
            return self._slice_dense(source, parts["weight"])
        require_complete(source.name, parts, entry)
        matrix = matrix_of(parts, entry)
        ranges = self.shard.slices(source.name, source.sizes, entry.shape)
        return RankSlices([slice_matrix(source.name, matrix, rows, columns) for rows, columns in ranges])

    def _slice_dense(self, source: CheckpointTensor, weight: Tensor) -> RankSlices:
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{source.name}: {list(weight.shape)} is no dense matrix, and config.json has no entry; {REMEDY}"
            )
        ranges = self.shard.slices(source.name, source.sizes, (weight.shape[0], weight.shape[1]))
        return RankSlices([weight[slice(*rows), slice(*columns)].clone() for rows, columns in ranges])

    def _slice_fused(self, source: CheckpointTensor, parts: Mapping[str, Tensor]) -> RankSlices:
        pieces = {}
        for piece, entry in source.entries.items():
            piece_parts = {part: parts[f"{piece}.{part}"] for part in entry.part_shapes()}
            require_complete(f"{source.name}.{piece}", piece_parts, entry)
            pieces[piece] = matrix_of(piece_parts, entry)
        assert isinstance(self.shard, LinearShard)
        return FusedMatrix(source.name, pieces, parts["weight"]).slice(source.sizes, self.shard)

    def slices(self) -> RankSlices:
        """The rank's slices of all sources.

        Raises:
            ValueError: parts are missing; names them.
        """
        matrices: list[CompressedMatrix | Tensor] = []
        orders, total = [], 0
        for number, source in enumerate(self.sources):
            if number not in self._slices:
                missing = [f"{source.name}.{part}" for part in source.parts if part not in self._arrived[number]]
                raise ValueError(f"not in the checkpoint: {', '.join(missing)}; {REMEDY}")
            slices = self._slices[number]
            rows = sum(_row_count(matrix) for matrix in slices.matrices)
            matrices += slices.matrices
            orders.append(total + (torch.arange(rows) if slices.order is None else slices.order))
            total += rows
        is_in_order = all(slices.order is None for slices in self._slices.values())
        return RankSlices(matrices, None if is_in_order else torch.cat(orders).to(_device(matrices[0])))


def _row_count(matrix: CompressedMatrix | Tensor) -> int:
    return len(matrix) if isinstance(matrix, Tensor) else int(matrix.entry.shape[0])


def _device(matrix: CompressedMatrix | Tensor) -> torch.device:
    return matrix.device if isinstance(matrix, Tensor) else next(iter(matrix.tensors.values())).device


def require_complete(name: str, parts: Mapping[str, Tensor], entry: Entry) -> None:
    """Raise ValueError, naming the tensor, unless `parts` have the shapes and kinds of `entry` and valid labels."""
    try:
        require_part_shapes(parts, entry)
    except ValueError as error:
        raise ValueError(f"{name}.{error}; {REMEDY}") from error
    try:
        matrix_of(parts, entry).require_valid()
    except ValueError as error:
        raise ValueError(f"{name}.labels: {error}; {REMEDY}") from error
