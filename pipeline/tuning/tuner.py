"""How far a compressed model's predictions are from the original's, and which way its stored values would mend that.

The loss is the divergence KL(p ‖ q) of the compressed model's prediction q from the original's p, in nats a token: the
original is the teacher, no text has to be right about anything. Its gradient by the logits is q − p; the rest is one
backward pass, in which the gradient of a whole weight never outlives its matrix.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.checkpoints.tensor_io import Payload, finished_sha256, read_tensor
from pipeline.device import deterministic
from pipeline.errors import CheckpointError, NonFiniteLoss
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.parameter_lookup import find_matrix_parameter
from pipeline.models.stored_model import open_model
from pipeline.storage.store import Store
from pipeline.tuning.state import TuneState, Values, from_payload
from swsc_core.compressed.codec import Encoded, encoded_as
from swsc_core.compressed.registry import matrix_of
from swsc_core.finetune import Tunable, tunable_values

_ROWS = 512  # positions whose predictions are compared at a time


@dataclass(frozen=True)
class TuneKey:
    """An original and a compressed form of it, by location, the arithmetic of both, and whether their code may be run.

    `known`: digests of the original, if it was verified.
    """

    original: str
    compressed: str
    dtype: str
    trusted: bool = False
    known: SourceDigests | None = None


class Tuner:
    """Both models, loaded; the compressed one takes on other stored values."""

    def __init__(self, key: TuneKey, device: str) -> None:
        self.key = key
        self._device = device
        self._teacher = _loaded(key, key.original, device, key.known)
        self._student = _loaded(key, key.compressed, device)
        self._tunables = tunables(key.compressed, device)
        model = open_model(key.compressed)
        self._views = {name: find_matrix_parameter(self._student, model, name) for name in self._tunables}
        self._values = self.start().values
        self._step = 0  # after which it has these values

    def start(self) -> TuneState:
        """The values that are stored."""
        return TuneState.start({name: tunable_values(tunable.matrix) for name, tunable in self._tunables.items()})

    def load_weights(self, step: int, *state: Payload) -> None:
        """Take on the values after `step` steps, or the stored ones if there is no `state`; not again if it has them."""
        if step == self._step:
            return
        self._step = -1  # half changed, it is at none
        values = from_payload(state[0], "values", self._device) if state else self.start().values
        for name, view in self._views.items():
            self._values[name] = self._tunables[name].rounded(values[name])
            view.put(self._tunables[name].restored(self._values[name]))
        self._step = step

    def divergence(self, windows: np.ndarray) -> float:
        """Sum over all tokens of KL(p ‖ q), for windows int64 [count, length]."""
        with torch.inference_mode(), deterministic(self._device):
            return sum(self._compare(window, backward=False) for window in windows)

    def gradients(self, windows: np.ndarray) -> tuple[float, Values]:
        """The same, and its gradient by the stored values: zeros for a matrix that no token came to, as an expert's may be.

        Raises:
            NonFiniteLoss: a divergence that is NaN or Inf.
            CheckpointError: text reaches none of the matrices.
        """
        sums: Values = {}
        sharing: dict[torch.nn.Parameter, list[str]] = {}
        for name, view in self._views.items():
            sharing.setdefault(view.parameter, []).append(name)
        handles = [
            parameter.requires_grad_().register_post_accumulate_grad_hook(self._hook(names, sums))
            for parameter, names in sharing.items()
        ]
        try:
            with deterministic(self._device):
                total = sum(self._compare(window, backward=True) for window in windows)
        finally:
            for handle in handles:
                handle.remove()
            self._student.requires_grad_(False)
        return total, {name: sums[name] if name in sums else _zeros(own) for name, own in self._values.items()}

    def _compare(self, window: np.ndarray, *, backward: bool) -> float:
        ids = torch.from_numpy(np.array(window))[None].to(self._device)
        with torch.inference_mode():
            wanted = forward(self._teacher, ids).logits[0]
        found = forward(self._student, ids).logits[0]
        slope = torch.empty_like(found) if backward else None
        total = 0.0
        for start in range(0, len(wanted), _ROWS):
            rows = slice(start, start + _ROWS)
            teacher, student = (logits[rows].detach().float().log_softmax(dim=-1) for logits in (wanted, found))
            total += float((teacher.exp() * (teacher - student)).sum(dtype=torch.float64))
            if slope is not None:
                slope[rows] = student.exp_().sub_(teacher.exp())
        if not np.isfinite(total):
            raise NonFiniteLoss(f"{self.key.compressed}: its predictions are NaN or Inf; tune in a wider dtype")
        if slope is not None:
            self._require_gradient(found)
            found.backward(slope)
        return total

    def _require_gradient(self, logits: Tensor) -> None:
        if not logits.requires_grad:
            raise CheckpointError(
                f"{self.key.original}: text reaches none of the {len(self._views)} compressed matrices, so they cannot be"
                " tuned; drop --tune, or select others"
            )

    def _hook(self, names: list[str], sums: Values) -> Any:
        def project(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for name in names:
                gradient = self._views[name].of(parameter.grad).float()
                found = self._tunables[name].gradients(self._values[name], gradient)
                before = sums.get(name)
                sums[name] = found if before is None else {part: before[part] + found[part] for part in found}
            parameter.grad = None

        return project


@dataclass(frozen=True)
class TunedValues:
    """What came of a tuning: a compressed model and, if tuning helped, the file of the state whose values replace its own."""

    compressed: str
    store: Store
    file: str | None

    @property
    def sha256(self) -> str:
        """Of that file; "" if there is none."""
        return finished_sha256(self.store, self.file) if self.file else ""

    def encoded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Encoded]:
        """Matrices with tuned values, one at a time; `weights` are names and originals, to compare with."""
        model, kept = open_model(self.compressed), read_header(self.store, self.file)[1] if self.file else []
        for name, weight in weights:
            parts = {part: tensor.to(weight.device) for part, tensor in model.read_parts(name).items()}
            matrix = matrix_of(parts, model.entries[name])
            infos = [info for info in kept if info.name.startswith(f"values/{name}/")]
            values = {info.name.rsplit("/", 1)[1]: read_tensor(self.store, info).to(weight.device) for info in infos}
            yield encoded_as(matrix.with_values(values) if values else matrix, weight, name)


def tunables(location: str, device: str) -> dict[str, Tunable]:
    """The matrices of a compressed model, ready to be tuned."""
    model = open_model(location)
    found = {}
    for name, entry in model.entries.items():
        tensors = {part: tensor.to(device) for part, tensor in model.read_parts(name).items()}
        found[name] = matrix_of(tensors, entry).tunable()
    return found


def _zeros(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: torch.zeros_like(value) for part, value in values.items()}


def _loaded(key: TuneKey, location: str, device: str, known: SourceDigests | None = None) -> Any:
    return load_model(
        open_model(location, known), ModelKey(location, key.dtype, 1, key.trusted), device
    ).requires_grad_(False)
