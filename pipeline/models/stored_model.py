"""A model as it lies in a directory, dense or compressed: opened from its headers, read tensor by tensor."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.architectures.tensor_info import TORCH_TO_SAFETENSORS, TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.checkpoints.integrity.source_digests import SourceDigests, with_source_digests
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import read_matrix, read_tensor
from pipeline.errors import CheckpointError
from swsc_core.compressed.config_json import entries_of, part_name
from swsc_core.compressed.entry import Entry
from swsc_core.storage.location import MatrixLocation, row_blocks_of
from swsc_core.storage.row_blocks import fuse_rows, require_partition
from swsc_core.storage.safetensors_header import BITS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A model as its user sees it: dense weights by name, whether they are stored dense or compressed."""

    checkpoint: Checkpoint
    entries: dict[str, Entry]

    @cached_property
    def pieces(self) -> dict[str, list[str]]:
        """joined tensor -> its compressed pieces, by the names of their entries."""
        found: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if entry.location.tensor is not None:
                found.setdefault(entry.location.tensor, []).append(name)
        return found

    @property
    def names(self) -> list[str]:
        """Names of the dense tensors, compressed ones by the name of the tensor that they stand for."""
        whole = self.entries.keys() - {piece for own in self.pieces.values() for piece in own}
        parts = {stored for name in self.entries for stored in self.parts(name).values()}
        return [name for name in self.checkpoint.tensors if name not in parts or name in whole]

    def is_compressed(self, name: str) -> bool:
        """Whether the dense tensor `name` is stored compressed, or pieces of it are."""
        return name in self.entries or name in self.pieces

    @property
    def weights(self) -> int:
        """Number of weights, those of compressed tensors as what they stand for."""
        return sum(self.count(name) for name in self.names)

    def count(self, name: str) -> int:
        """Number of weights of the dense tensor `name`."""
        return math.prod(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor `name`."""
        if name in self.entries:
            return self.entries[name].location.tensor_shape(*self.entries[name].shape)
        rest = self.checkpoint.tensors[name].shape
        if name not in self.pieces:
            return rest
        own = [self.entries[piece] for piece in self.pieces[name]]
        return own[0].location.tensor_shape(rest[0] + sum(entry.shape[0] for entry in own), rest[1])

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of the dense tensor `name`."""
        entry = self.entries.get(self.pieces[name][0] if name in self.pieces else name)
        return TORCH_TO_SAFETENSORS[entry.dtype] if entry else self.checkpoint.tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the dense tensor `name`."""
        return self.count(name) * BITS[self.dtype(name)] // 8

    @property
    def config(self) -> dict[str, Any]:
        """The model's own config, without what says that it is compressed."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def location(self, name: str) -> MatrixLocation:
        """Where the matrix `name` lies in the dense model: that of an entry, or a matrix of a dense checkpoint."""
        from pipeline.models.matrices import find_matrix

        if name in self.entries:
            return self.entries[name].location
        return find_matrix(self.checkpoint, name).location

    def parts(self, tensor: str) -> dict[str, str]:
        """part -> stored name, of a compressed tensor."""
        return {part: part_name(tensor, part) for part in self.entries[tensor].part_shapes()}

    def read(self, name: str, bare: bool = False) -> "Tensor":
        """The dense tensor `name`, on the CPU; if `bare`, without the low-rank part of one that is compressed whole."""
        if not self.is_compressed(name):
            return read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        if name in self.pieces:
            return self._fused(name)
        return self.entries[name].location.to_checkpoint_layout(self.read_matrix(name, bare))

    def read_matrix(self, name: str, bare: bool = False) -> "Tensor":
        """The matrix [outputs, inputs] `name`, on the CPU: what an entry stands for, or a matrix of a dense checkpoint."""
        from pipeline.models.matrices import find_matrix
        from swsc_core.compressed.codec import checked_matrix_of

        if name not in self.entries:
            return read_matrix(self.checkpoint.store, find_matrix(self.checkpoint, name))
        matrix = checked_matrix_of(self.read_parts(name), self.entries[name])
        return matrix.without_low_rank() if bare else matrix.restore()

    def _fused(self, name: str) -> "Tensor":
        rest = read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        parts = self.pieces[name]
        rows = row_blocks_of(self.entries[part].location for part in parts)
        fused = fuse_rows(rest, rows, map(self.read_matrix, parts))
        return self.entries[parts[0]].location.to_checkpoint_layout(fused)

    def read_parts(self, name: str) -> dict[str, "Tensor"]:
        """part -> tensor, of a compressed tensor, on the CPU."""
        tensors, store = self.checkpoint.tensors, self.checkpoint.store
        return {part: read_tensor(store, tensors[where]) for part, where in self.parts(name).items()}


def open_model(location: str, known: SourceDigests | None = None) -> Model:
    """Open a dense or compressed model from its headers.

    Args:
        known: of a model that was verified: other bytes than those are never read.

    Raises:
        CheckpointError: as `open_checkpoint`; an unfinished or incomplete output; a format or method not known here.
        StoreError: what describes the model is read as other bytes than when it was verified.
    """
    checkpoint = open_checkpoint(location)
    if known:
        checkpoint = with_source_digests(checkpoint, known)
    quantization = checkpoint.config.get("quantization_config") or {}
    if quantization.get("quant_method") != "swsc":
        require_unquantized(location, checkpoint.tensors, checkpoint.config)
        return Model(checkpoint, {})
    try:
        entries = entries_of(quantization)
    except ValueError as error:
        raise CheckpointError(f"{location}: {error}") from None
    model = Model(checkpoint, entries)
    missing = [at for name in model.entries for at in model.parts(name).values() if at not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{location}: {missing[0]} is missing ({len(missing)} in all); compress again")
    for name, pieces in model.pieces.items():
        rest = None if name in model.entries else checkpoint.tensors.get(name)
        try:
            _require_fused(rest, [model.entries[piece] for piece in pieces])
        except ValueError as error:
            raise CheckpointError(
                f"{location}: the parts of {name} do not make up the fused tensor ({error}); compress again"
            ) from None
    return model


def _require_fused(rest: TensorInfo | None, parts: list[Entry]) -> None:
    """Raise ValueError unless the parts of a fused tensor, by their entries, and its remaining rows make up the tensor.

    Args:
        rest: the tensor of the remaining rows that is stored under the fused tensor's name.
    """
    if rest is None or len(rest.shape) != 2:
        raise ValueError("its remaining rows are missing")
    locations = [entry.location for entry in parts]
    common = {(location.transposed, location.n_experts) for location in locations}
    kinds = {(entry.shape[1], entry.dtype) for entry in parts}
    if len(common) != 1 or len(kinds) != 1 or rest.shape[1] != parts[0].shape[1]:
        raise ValueError("its parts differ in columns, dtype, transposed or stacked")
    experts = locations[0].n_experts or 1
    if (rest.shape[0] + sum(entry.shape[0] for entry in parts)) % experts:
        raise ValueError(f"their rows are not those of {experts} matrices")
    require_partition(rest.shape[0], row_blocks_of(locations))
