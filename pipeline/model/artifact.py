"""A model as it lies in a directory, dense or compressed: opened from its headers, read tensor by tensor."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import Checkpoint, open_checkpoint
from pipeline.model.entries import what_is_wrong
from pipeline.model.parts import read_tensor
from swsc_core.format import entries_of, part_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A model as its user sees it: dense weights by name, whether they are stored dense or compressed."""

    checkpoint: Checkpoint
    entries: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of the dense tensors, compressed ones by the name of the tensor that they stand for."""
        parts = {name for tensor in self.entries for name in self.parts(tensor).values() if name != tensor}
        return [name for name in self.checkpoint.tensors if name not in parts]

    @property
    def weights(self) -> int:
        """Number of weights, those of compressed tensors as what they stand for."""
        return sum(self.count(name) for name in self.names)

    def count(self, name: str) -> int:
        """Number of weights of the dense tensor `name`."""
        return math.prod(self.entries[name]["shape"]) if name in self.entries else self.checkpoint.tensors[name].count

    @property
    def config(self) -> dict[str, Any]:
        """The model's own config, without what says that it is compressed."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def parts(self, tensor: str) -> dict[str, str]:
        """part -> stored name, of a compressed tensor."""
        from swsc_core.codec import parts_of

        return {part: part_name(tensor, part) for part in parts_of(self.entries[tensor])}

    def read(self, name: str, bare: bool = False) -> "Tensor":
        """The dense tensor `name`, on the CPU; if `bare`, without the low-rank part of a compressed one."""
        from swsc_core import decode
        from swsc_core.apart import shared_part

        if name not in self.entries:
            return read_tensor(self.checkpoint.store, self.checkpoint.tensors[name])
        return (shared_part if bare else decode)(self.read_parts(name), self.entries[name])

    def read_parts(self, name: str) -> dict[str, "Tensor"]:
        """part -> tensor, of a compressed tensor, on the CPU."""
        tensors, store = self.checkpoint.tensors, self.checkpoint.store
        return {part: read_tensor(store, tensors[where]) for part, where in self.parts(name).items()}


def open_model(location: str) -> Model:
    """Open a dense or compressed model from its headers.

    Raises:
        CheckpointError: as `open_checkpoint`; an unfinished or incomplete output; a format or method not known here.
    """
    checkpoint = open_checkpoint(location)
    quantization = checkpoint.config.get("quantization_config") or {}
    if not quantization:
        return Model(checkpoint, {})
    if quantization.get("quant_method") != "swsc":
        raise CheckpointError(
            f"{location}: quantized by {quantization.get('quant_method')!r}; give the unquantized model"
        )
    try:
        entries = entries_of(quantization)
    except ValueError as error:
        raise CheckpointError(f"{location}: {error}") from None
    if wrong := what_is_wrong(entries):
        raise CheckpointError(
            f"{location}: quantization_config does not say what is compressed ({wrong}); compress again"
        )
    model = Model(checkpoint, entries)
    missing = [
        where for name in model.entries for where in model.parts(name).values() if where not in checkpoint.tensors
    ]
    if missing:
        raise CheckpointError(f"{location}: {missing[0]} is missing ({len(missing)} in all); compress again")
    return model
