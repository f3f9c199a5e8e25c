"""Divergence of a compressed model from the original, and its gradient with respect to the stored values.

The loss is KL(p ‖ q) in nats per token, with the prediction p of the original model and q of the compressed model. It
is a distillation loss: the original is the teacher, and the text needs no labels. The gradient with respect to the
logits is q − p. During the backward pass, the gradient of each dense weight is projected onto stored values and
released at once.
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
from pipeline.errors import CheckpointError, NonFiniteLoss
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.parameter_lookup import find_matrix_parameter
from pipeline.models.stored_model import Model, open_model
from pipeline.storage.store import Store
from pipeline.tuning.state import MatrixValues, TuneState, values_from_payload, zeros_like
from swsc_core.compressed.codec import Encoded, encoded_as
from swsc_core.compressed.registry import matrix_of
from swsc_core.finetune import Tunable, tunable_values

# Positions whose predictions are compared at a time, which bounds the float32 copies of logits.
_POSITIONS = 512


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
        self._tunables = load_tunables(key.compressed, device)
        model = open_model(key.compressed)
        self._views = {name: find_matrix_parameter(self._student, model, name) for name in self._tunables}
        self._values = self.start().values
        # number of steps after which the model has its present values
        self._step = 0

    def start(self) -> TuneState:
        """State before the first step, with the values of the compressed model."""
        return TuneState.start({name: tunable_values(tunable.matrix) for name, tunable in self._tunables.items()})

    def load_weights(self, step: int, *state: Payload) -> None:
        """Load the values after `step` steps from `state`, or without it those of the compressed model.

        Does nothing if the model has these values already.
        """
        if step == self._step:
            return
        self._step = -1  # invalid until all values are loaded
        values = values_from_payload(state[0], "values", self._device) if state else self.start().values
        for name, view in self._views.items():
            self._values[name] = self._tunables[name].rounded(values[name])
            view.put(self._tunables[name].restored(self._values[name]))
        self._step = step

    def divergence(self, windows: np.ndarray) -> float:
        """Sum over all tokens of KL(p ‖ q), for windows int64 [count, length]."""
        with torch.inference_mode(), deterministic(self._device):
            return sum(self._compare(window, backward=False) for window in windows)

    def gradients(self, windows: np.ndarray) -> tuple[float, MatrixValues]:
        """Sum over all tokens of KL(p ‖ q), and its gradient with respect to the stored values.

        The gradient of a matrix that no token reached, such as an expert's, is zero.

        Raises:
            NonFiniteLoss: the divergence is NaN or Inf.
            CheckpointError: no token reaches any of the matrices.
        """
        sums: MatrixValues = {}
        matrices: dict[Any, list[str]] = {}
        for name, view in self._views.items():
            matrices.setdefault(view.parameter, []).append(name)
        handles = [
            parameter.requires_grad_().register_post_accumulate_grad_hook(self._projection_hook(names, sums))
            for parameter, names in matrices.items()
        ]
        try:
            with deterministic(self._device):
                total = sum(self._compare(window, backward=True) for window in windows)
        finally:
            for handle in handles:
                handle.remove()
            self._student.requires_grad_(False)
        return total, {name: sums[name] if name in sums else zeros_like(each) for name, each in self._values.items()}

    def _compare(self, window: np.ndarray, *, backward: bool) -> float:
        """Sum of KL(p ‖ q) over the tokens of one window, int64 [seqlen]; optionally with the backward pass."""
        ids = torch.from_numpy(np.array(window))[None].to(self._device)
        with torch.inference_mode():
            teacher_logits = forward(self._teacher, ids).logits[0]
        student_logits = forward(self._student, ids).logits[0]
        gradient = torch.empty_like(student_logits) if backward else None
        total = 0.0
        for start in range(0, len(teacher_logits), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            teacher, student = (
                logits[rows].detach().float().log_softmax(dim=-1) for logits in (teacher_logits, student_logits)
            )
            total += float((teacher.exp() * (teacher - student)).sum(dtype=torch.float64))
            if gradient is not None:
                gradient[rows] = student.exp_().sub_(teacher.exp())
        if not np.isfinite(total):
            raise NonFiniteLoss(
                f"{self.key.compressed}: the predictions are NaN or Inf; choose a wider dtype with --calibration-dtype"
            )
        if gradient is not None:
            self._require_gradient(student_logits)
            student_logits.backward(gradient)
        return total

    def _require_gradient(self, logits: Tensor) -> None:
        if not logits.requires_grad:
            raise CheckpointError(
                f"{self.key.original}: no token reaches any of the {len(self._views)} compressed matrices, so they"
                " cannot be tuned; drop --tune, or select other matrices"
            )

    def _projection_hook(self, names: list[str], sums: MatrixValues) -> Any:
        """Hook that adds the gradients of the stored values of `names` to `sums`, and releases the dense gradient."""

        def project(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for name in names:
                dense = self._views[name].of(parameter.grad).float()
                gradients = self._tunables[name].gradients(self._values[name], dense)
                before = sums.get(name)
                sums[name] = (
                    gradients if before is None else {part: before[part] + gradients[part] for part in gradients}
                )
            parameter.grad = None

        return project


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


def load_tunables(location: str, device: str) -> dict[str, Tunable]:
    """The matrices of a compressed model in the form that is tuned."""
    model = open_model(location)
    tunables = {}
    for name, entry in model.entries.items():
        tensors = {part: tensor.to(device) for part, tensor in model.read_parts(name).items()}
        tunables[name] = matrix_of(tensors, entry).tunable()
    return tunables


def _loaded(key: TuneKey, location: str, device: str, known: SourceDigests | None = None) -> Any:
    return load_model(
        open_model(location, known), ModelKey(location, key.dtype, 1, key.trusted), device
    ).requires_grad_(False)
