"""Divergence of a compressed model from the original, and its gradient with respect to the stored values.

The original is the teacher of a distillation, so the text needs no labels. During the backward pass, the gradient of
each dense weight is projected onto stored values and released at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.checkpoints.tensor_io import Payload, finished_sha256, read_tensor
from pipeline.device import deterministic
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.parameter_lookup import find_matrix_parameter
from pipeline.models.stored_model import Model, open_model
from pipeline.storage.store import Store
from pipeline.tuning.divergence import backward_from_divergence, divergence
from pipeline.tuning.matrices import TunedMatrices, load_tunable
from pipeline.tuning.state import MatrixValues, values_from_payload
from swsc_core.compressed.codec import Encoded, encoded_as
from swsc_core.compressed.registry import matrix_of


@dataclass(frozen=True)
class TuneKey:
    """What a `Tuner` is loaded from and as.

    Attributes:
        original, compressed: locations of the two models.
        dtype: torch name of the dtype of both, or "auto".
        trusted: whether code that a model brings may be run.
        known: digests of the original if it was verified; all bytes that are read are compared with them.
    """

    original: str
    compressed: str
    dtype: str
    trusted: bool = False
    known: SourceDigests | None = None


class Tuner:
    """The original and the compressed model, loaded. The stored values of the compressed model can be replaced."""

    def __init__(self, key: TuneKey, device: str) -> None:
        self.key = key
        self._device = device
        self._teacher = _loaded(key, key.original, device, key.known)
        self._student = _loaded(key, key.compressed, device)
        model = open_model(key.compressed)
        tunables = {name: load_tunable(model, name, device) for name in model.entries}
        views = {name: find_matrix_parameter(self._student, model, name) for name in tunables}
        self.matrices = TunedMatrices(tunables, views)
        # number of steps after which the model has its present values
        self._step = 0

    def load_weights(self, step: int, *state: Payload) -> None:
        """Load the values after `step` steps from `state`, or without it those of the compressed model.

        Does nothing if the model has these values already.
        """
        if step == self._step:
            return
        self._step = -1  # invalid until all values are loaded
        values = values_from_payload(state[0], "values", self._device) if state else self.matrices.stored_values()
        self.matrices.put(values)
        self._step = step

    def divergence(self, windows: np.ndarray) -> float:
        """Sum over all tokens of KL(p ‖ q), for windows int64 [count, length]."""
        with torch.inference_mode(), deterministic(self._device):
            logits = ((self._teacher_logits(window), self._student_logits(window)) for window in windows)
            return sum(divergence(teacher, student, self.key.compressed) for teacher, student in logits)

    def gradients(self, windows: np.ndarray) -> tuple[float, MatrixValues]:
        """Sum over all tokens of KL(p ‖ q), and its gradient with respect to the stored values.

        The gradient of a matrix that no token reached, such as an expert's, is zero.

        Raises:
            NonFiniteLoss: the divergence is NaN or Inf.
            CheckpointError: no token reaches any of the matrices.
        """
        total = 0.0
        with self.matrices.projected_gradients() as sums, deterministic(self._device):
            for window in windows:
                teacher = self._teacher_logits(window)
                total += backward_from_divergence(teacher, self._student_logits(window), self.key.compressed)
        return total, self.matrices.completed(sums)

    def _teacher_logits(self, window: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return self._logits(self._teacher, window)

    def _student_logits(self, window: np.ndarray) -> Tensor:
        return self._logits(self._student, window)

    def _logits(self, model: Any, window: np.ndarray) -> Tensor:
        """Logits [seqlen, vocabulary] of one window, int64 [seqlen]."""
        logits: Tensor = forward(model, torch.from_numpy(np.array(window))[None].to(self._device)).logits[0]
        return logits


@dataclass(frozen=True)
class TunedValues:
    """Result of a tuning.

    Attributes:
        compressed: location of the compressed model.
        file: file in `store` of the state whose values replace those of the model; None if tuning did not help.
    """

    compressed: str
    store: Store
    file: str | None

    @property
    def sha256(self) -> str:
        """Digest of the state file; "" if there is none."""
        return finished_sha256(self.store, self.file) if self.file else ""

    def encoded(self, model: Model, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Encoded]:
        """Matrices with tuned values, one at a time.

        Args:
            model: the compressed model.
            weights: names and original weights, for the error measures.
        """
        tuned: dict[str, list[TensorInfo]] = defaultdict(list)
        for info in read_header(self.store, self.file)[1] if self.file else []:
            tuned[info.name.rpartition("/")[0]].append(info)
        for name, weight in weights:
            parts = {part: tensor.to(weight.device) for part, tensor in model.read_parts(name).items()}
            matrix = matrix_of(parts, model.entries[name])
            infos = tuned[f"values/{name}"]
            values = {info.name.rsplit("/", 1)[1]: read_tensor(self.store, info).to(weight.device) for info in infos}
            yield encoded_as(matrix.with_values(values) if values else matrix, weight, name)


def _loaded(key: TuneKey, location: str, device: str, known: SourceDigests | None = None) -> Any:
    return load_model(
        open_model(location, known), ModelKey(location, key.dtype, 1, key.trusted), device
    ).requires_grad_(False)
