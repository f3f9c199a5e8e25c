"""Perplexity: mean cross-entropy over the L−1 shifted tokens of each window, exp of the mean over windows.

A window's loss depends on that window alone (and on the fixed shape of the batch that it is in), and the sum runs in
float64 over window indices: the result is the same to the last bit for any number of workers with processors of one kind, and for
any layout of the model's files, since weights are moved to aligned memory.
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

_ROWS = 512  # positions whose logits are made float32 at a time: 512 × 128k values are 256 MiB


def perplexity(losses: Sequence[float], what: str) -> float:
    """exp of the mean loss; raises NonFiniteLoss that says which window is NaN or Inf."""
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"{what}: the loss of window {index} is {loss}; the model is broken, nothing is dropped"
            )
    return math.exp(math.fsum(losses) / len(losses))


class Evaluator:
    """One loaded model, into which the compressed weights of a variant can be swapped and out again."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        self._source = open_model(key.location, key.known)
        self._model = load_model(self._source, key, device)
        self._device = device
        self._swapped: set[str] = set()
        self._views: dict[str, ParameterView] = {}
        self._variant: str | None = ""

    @property
    def dtype(self) -> str:
        """torch's name of the model's arithmetic."""
        return str(self._model.dtype).removeprefix("torch.")

    def load_weights(self, variant: str, weights: Mapping[str, Payload]) -> None:
        """Hold exactly `weights` (matrix name -> compressed parts) in place of the model's own; "" is the model as is.

        Weights of an earlier variant are read again from the checkpoint: a second copy is never kept.
        """
        if variant == self._variant:
            return
        self._variant = None
        for name in sorted(self._swapped - weights.keys()):
            self._put(name, self._source.read_matrix(name))
        for name, payload in weights.items():
            parts = {part.name: to_tensor(part).to(self._device) for part in payload.parts}
            self._put(name, decode(parts, entry_of(payload.rows[0]["entry"])))
        self._swapped, self._variant = set(weights), variant

    def _put(self, name: str, weight: Tensor) -> None:
        if name not in self._views:
            self._views[name] = find_matrix_parameter(self._model, self._source, name)
        self._views[name].put(weight)

    def losses(self, windows: np.ndarray) -> list[float]:
        """Mean loss of each window, int64 [windows, seqlen]."""
        return window_losses(self._model, windows, self.key.batch_size)


@torch.inference_mode()
def window_losses(model: Any, windows: np.ndarray, batch_size: int = 1) -> list[float]:
    """Mean loss of each window, int64 [windows, seqlen], under a causal LM of transformers."""
    ids = torch.from_numpy(np.array(windows)).to(model.device)
    with ordered_scans(model.device.type):
        return [loss for batch in ids.split(batch_size) for loss in _batch_losses(model, batch)]


def _batch_losses(model: Any, batch: Tensor) -> list[float]:
    logits = forward(model, batch).logits
    return [_window_loss(rows[:-1], ids[1:]) for rows, ids in zip(logits, batch, strict=True)]


def _window_loss(logits: Tensor, targets: Tensor) -> float:
    pairs = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    total = [
        torch.nn.functional.cross_entropy(rows.float(), ids, reduction="none").sum(dtype=torch.float64)
        for rows, ids in pairs
    ]
    return math.fsum(float(part) for part in total) / len(targets)
