"""Perplexity: mean cross-entropy over the L − 1 shifted tokens of each window, and exp of the mean over windows.

The loss of a window depends only on that window and on the fixed shape of its batch. Sums run in float64 in the order
of the windows. The result is therefore identical to the last bit for any number of workers with processors of one kind.
It does not depend on the layout of the model's files either, because weights are moved to aligned memory.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.tensor_io import Payload, to_tensor
from pipeline.device import ordered_scans
from pipeline.errors import NonFiniteLoss
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.parameter_lookup import ParameterView, find_matrix_parameter
from pipeline.models.stored_model import open_model
from swsc_core import decode
from swsc_core.compressed.registry import entry_of

# Positions whose logits are converted to float32 at a time: 512 × 128k values are 256 MiB.
_POSITIONS = 512


def perplexity(losses: Sequence[float], location: str) -> float:
    """exp of the mean loss. Raises NonFiniteLoss that names the model and the window whose loss is NaN or Inf."""
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"{location}: the loss of window {index} is {loss}, and no window may be dropped; use a wider --dtype,"
                " or check the model"
            )
    return math.exp(math.fsum(losses) / len(losses))


class Evaluator:
    """A loaded model whose weights can be replaced by the compressed weights of a variant."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        self._source = open_model(key.location, key.known)
        self._model = load_model(self._source, key, device)
        self._device = device
        self._replaced: set[str] = set()
        self._views: dict[str, ParameterView] = {}
        self._variant: str | None = ""

    @property
    def dtype(self) -> str:
        """torch name of the dtype that the model computes in."""
        return str(self._model.dtype).removeprefix("torch.")

    def load_weights(self, variant: str, weights: Mapping[str, Payload]) -> None:
        """Replace exactly the matrices in `weights` (name -> compressed parts).

        `variant` identifies the replacement; "" stands for the model without replacements.
        Matrices of an earlier variant are read again from the checkpoint, so that no second copy is kept in memory.
        """
        if variant == self._variant:
            return
        self._variant = None
        for name in sorted(self._replaced - weights.keys()):
            self._put(name, self._source.read_matrix(name))
        for name, payload in weights.items():
            self._put(name, decoded(payload, self._device))
        self._replaced, self._variant = set(weights), variant

    def _put(self, name: str, weight: Tensor) -> None:
        if name not in self._views:
            self._views[name] = find_matrix_parameter(self._model, self._source, name)
        self._views[name].put(weight)

    def losses(self, windows: np.ndarray) -> list[float]:
        """Mean loss of each window, int64 [windows, seqlen]."""
        return window_losses(self._model, windows, self.key.batch_size)


def decoded(payload: Payload, device: str) -> Tensor:
    """The dense weight of a compressed matrix."""
    parts = {part.name: to_tensor(part).to(device) for part in payload.parts}
    return decode(parts, entry_of(payload.rows[0]["entry"]))


@torch.inference_mode()
def window_losses(model: Any, windows: np.ndarray, batch_size: int = 1) -> list[float]:
    """Mean loss of each window, int64 [windows, seqlen], under a causal LM of transformers, in nats per token."""
    ids = torch.from_numpy(np.array(windows)).to(model.device)
    with ordered_scans(model.device.type):
        batches = torch.split(ids, batch_size)
        return [loss for batch in batches for loss in batch_losses(forward(model, batch).logits, batch)]


def batch_losses(logits: Tensor, batch: Tensor) -> list[float]:
    """Mean loss of each window of a batch, int64 [batch, seqlen], under its logits [batch, seqlen, vocabulary]."""
    return [_window_loss(rows[:-1], ids[1:]) for rows, ids in zip(logits, batch, strict=True)]


def _window_loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy of logits [positions, vocabulary] and targets, int64 [positions]."""
    pairs = zip(torch.split(logits, _POSITIONS), torch.split(targets, _POSITIONS), strict=True)
    total = [
        torch.nn.functional.cross_entropy(rows.float(), ids, reduction="none").sum(dtype=torch.float64)
        for rows, ids in pairs
    ]
    return math.fsum(float(part) for part in total) / len(targets)
