"""A model in a directory, dense or compressed: opened from its headers, read tensor by tensor."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.architectures.model_config import ModelConfig
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
    """Access to dense weights by name, whether they are stored dense or compressed.

    Attributes:
        checkpoint: the stored tensors.
        entries: name of a compressed matrix -> its entry in config.json.
    """

    checkpoint: Checkpoint
    entries: dict[str, Entry]

    @cached_property
    def pieces(self) -> dict[str, list[str]]:
        """Fused tensor -> names of its compressed pieces."""
        pieces: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if entry.location.tensor is not None:
                pieces.setdefault(entry.location.tensor, []).append(name)
        return pieces

    @property
    def names(self) -> list[str]:
        """Names of the dense tensors, including those that are stored compressed."""
        whole = self.entries.keys() - {piece for pieces in self.pieces.values() for piece in pieces}
        parts = {stored for name in self.entries for stored in self.parts(name).values()}
        return [name for name in self.checkpoint.tensors if name not in parts or name in whole]

    def is_compressed(self, name: str) -> bool:
        """Return whether the dense tensor `name`, or a piece of it, is stored compressed."""
        return name in self.entries or name in self.pieces

    @property
    def weights(self) -> int:
        """Number of weights of the dense model."""
        return sum(self.count(name) for name in self.names)

    def count(self, name: str) -> int:
        """Return the number of weights of the dense tensor `name`."""
        return math.prod(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the dense tensor `name`."""
        if name in self.entries:
            return self.entries[name].location.tensor_shape(*self.entries[name].shape)
        stored = self.checkpoint.tensors[name].shape
        if name not in self.pieces:
            return stored
        pieces = [self.entries[piece] for piece in self.pieces[name]]
        return pieces[0].location.tensor_shape(stored[0] + sum(entry.shape[0] for entry in pieces), stored[1])

    def dtype(self, name: str) -> str:
        """Return safetensors' name of the dtype of the dense tensor `name`."""
        entry = self.entries.get(self.pieces[name][0] if name in self.pieces else name)
        return TORCH_TO_SAFETENSORS[entry.dtype] if entry else self.checkpoint.tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the bytes of the dense tensor `name`."""
        return self.count(name) * BITS[self.dtype(name)] // 8

    @property
    def config(self) -> ModelConfig:
        """The config of the dense model: without the key that describes the compression."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def location(self, name: str) -> MatrixLocation:
        """Return the location of the matrix `name` in the dense model, whether it is stored dense or compressed."""
        from pipeline.models.matrices import find_matrix

        if name in self.entries:
            return self.entries[name].location
        return find_matrix(self.checkpoint, name).location

    def parts(self, tensor: str) -> dict[str, str]:
        """Return the stored name of each part of a compressed tensor."""
        return {part: part_name(tensor, part) for part in self.entries[tensor].part_shapes()}

    def read(self, name: str, bare: bool = False) -> "Tensor":
        """Read the dense tensor `name`, on the CPU.

        If `bare`, the low-rank part of a tensor that is compressed as one matrix is left out.
        """
        if not self.is_compressed(name):
            return read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        if name in self.pieces:
            return self._fused(name)
        return self.entries[name].location.to_checkpoint_layout(self.read_matrix(name, bare))

    def read_matrix(self, name: str, bare: bool = False) -> "Tensor":
        """Read the matrix [outputs, inputs] `name`, on the CPU, from an entry or from a dense checkpoint."""
        from pipeline.models.matrices import find_matrix
        from swsc_core.compressed.codec import checked_matrix_of

        if name not in self.entries:
            return read_matrix(self.checkpoint.store, find_matrix(self.checkpoint, name))
        matrix = checked_matrix_of(self.read_parts(name), self.entries[name])
        return matrix.without_low_rank() if bare else matrix.restore()

    def _fused(self, name: str) -> "Tensor":
        remaining_rows = read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        pieces = self.pieces[name]
        rows = row_blocks_of(self.entries[piece].location for piece in pieces)
        fused = fuse_rows(remaining_rows, rows, map(self.read_matrix, pieces))
        return self.entries[pieces[0]].location.to_checkpoint_layout(fused)

    def read_parts(self, name: str) -> dict[str, "Tensor"]:
        """Read the parts of a compressed tensor, on the CPU, by the names of the parts."""
        tensors, store = self.checkpoint.tensors, self.checkpoint.store
        return {part: read_tensor(store, tensors[stored]) for part, stored in self.parts(name).items()}


def open_model(location: str, known: SourceDigests | None = None) -> Model:
    """Open a dense or compressed model from its headers.

    Args:
        location: directory, object store or Hub id.
        known: digests of a verified model; other bytes are never read.

    Raises:
        CheckpointError: as `open_checkpoint`; the output is unfinished or incomplete; the format or a method is
            unknown.
        StoreError: files that describe the model have changed since it was verified.
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
    stored = [part for name in model.entries for part in model.parts(name).values()]
    missing = [name for name in stored if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{location}: {missing[0]} is missing ({len(missing)} in all); compress again")
    for name, pieces in model.pieces.items():
        remaining_rows = None if name in model.entries else checkpoint.tensors.get(name)
        try:
            _require_fused(remaining_rows, [model.entries[piece] for piece in pieces])
        except ValueError as error:
            raise CheckpointError(
                f"{location}: the pieces of {name} are not a partition of the fused tensor ({error}); compress again"
            ) from None
    return model


def opened_once(location: str, device: str) -> Model:
    """`open_model` for `JobContext.model`: a worker parses the headers of a model once, not in every task."""
    return open_model(location)


def _require_fused(remaining_rows: TensorInfo | None, pieces: list[Entry]) -> None:
    """Raise ValueError unless the pieces of a fused tensor and its remaining rows are a partition of the tensor.

    Args:
        remaining_rows: the tensor that is stored under the fused tensor's name.
        pieces: entries of the pieces.
    """
    if remaining_rows is None or len(remaining_rows.shape) != 2:
        raise ValueError("its remaining rows are missing")
    locations = [entry.location for entry in pieces]
    common = {(location.transposed, location.n_experts) for location in locations}
    kinds = {(entry.shape[1], entry.dtype) for entry in pieces}
    if len(common) != 1 or len(kinds) != 1 or remaining_rows.shape[1] != pieces[0].shape[1]:
        raise ValueError("its pieces differ in columns, dtype, transposed or stacked")
    experts = locations[0].n_experts or 1
    if (remaining_rows.shape[0] + sum(entry.shape[0] for entry in pieces)) % experts:
        raise ValueError(f"the number of rows is not a multiple of {experts} experts")
    require_partition(remaining_rows.shape[0], row_blocks_of(locations))
