"""What a worker keeps between the tasks of a model in blocks: the skeleton, the loaded block and the one read ahead."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.blocks.block import Block
from pipeline.blocks.layered_model import LayeredModel
from pipeline.blocks.skeleton import Skeleton
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor, to_tensor
from pipeline.engine.malloc import return_freed_blocks
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model

_HIDDEN = "hidden"


@dataclass(frozen=True)
class BlockKey:
    """From where and how a model is loaded in blocks.

    Attributes:
        model: location and dtype.
        tuple_length: length of the tuple that its layers return, see `LayeredModel`.
    """

    model: ModelKey
    tuple_length: int


class BlockRunner:
    """Runs blocks of one model."""

    def __init__(self, key: BlockKey, device: str, digests: RangeDigests | None = None) -> None:
        """Build the model without parameters; `digests` receives those of the tensors that are read later."""
        self.device = device
        self.skeleton = Skeleton(open_model(key.model.location, key.model.known), key.model, device, digests)
        self.layered = LayeredModel(self.skeleton, key.tuple_length)
        self._bytes_counted = 0

    @property
    def dtype(self) -> str:
        """torch name of the dtype that the model computes in."""
        return str(self.skeleton.model.dtype).removeprefix("torch.")

    def load(self, block: Block, upcoming: Block | None = None) -> None:
        """Load a block, and begin to read the upcoming one."""
        # Layers come and go, and a fragmented heap would grow far beyond them.
        return_freed_blocks(self.layered.weights_of(block))
        self.layered.load(block)
        if upcoming is not None:
            self.skeleton.read_ahead(self.layered.parameters_of(upcoming))

    def new_bytes_read(self) -> int:
        """Bytes that were read from files since the last call, also ahead of time between two tasks."""
        before, self._bytes_counted = self._bytes_counted, self.skeleton.bytes_read
        return self._bytes_counted - before

    def batches(self, windows: np.ndarray, size: int) -> tuple[Tensor, ...]:
        """Windows, int64 [windows, seqlen], as batches on the device."""
        return torch.split(torch.from_numpy(np.array(windows)).to(self.device), size)


def hidden_payload(states: Iterable[Tensor]) -> Payload:
    """Hidden states of the batches of a shard [batch, length, width] as a payload."""
    return Payload(tuple(to_stored_tensor(f"{_HIDDEN}.{number}", state) for number, state in enumerate(states)))


def hidden_states(payload: Payload, device: str) -> list[Tensor]:
    """Inverse of `hidden_payload`."""
    return [to_tensor(part).to(device) for part in payload.parts]
