"""State of a tuning: the stored values of all matrices, and the running means of the Adam optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor, to_tensor
from swsc_core.finetune import AdamState, adam_step, step_unit

# matrix -> name of a stored value (swsc_core/finetune.py) -> float32 tensor
MatrixValues = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class TuneState:
    """Stored values, and the running means of their gradients and of the squares of their gradients."""

    values: MatrixValues
    means: MatrixValues
    squares: MatrixValues

    @classmethod
    def start(cls, values: MatrixValues) -> "TuneState":
        """State before the first step."""
        zeros = {name: zeros_like(each) for name, each in values.items()}
        return cls(values, zeros, zeros)

    def stepped(self, gradients: MatrixValues, step: int, rate: float) -> "TuneState":
        """State after step number `step`, which is counted from 1.

        A value moves by at most about `rate` times its unit.
        """
        values, means, squares = MatrixValues(), MatrixValues(), MatrixValues()
        for name, matrix_values in self.values.items():
            values[name], means[name], squares[name] = {}, {}, {}
            for part, value in matrix_values.items():
                state = AdamState(value, self.means[name][part], self.squares[name][part])
                values[name][part], means[name][part], squares[name][part] = adam_step(
                    state, gradients[name][part], step_unit(part, value), step, rate
                )
        return TuneState(values, means, squares)

    def to_payload(self) -> Payload:
        """The state as parts named "values/…", "means/…" and "squares/…"."""
        kinds = {"values": self.values, "means": self.means, "squares": self.squares}
        return Payload(tuple(part for kind, values in kinds.items() for part in values_to_payload(values, kind).parts))

    @classmethod
    def from_payload(cls, payload: Payload, device: str) -> "TuneState":
        """Inverse of `to_payload`."""
        return cls(*(values_from_payload(payload, kind, device) for kind in ("values", "means", "squares")))


def values_to_payload(values: MatrixValues, kind: str) -> Payload:
    """Values as parts named "KIND/MATRIX/VALUE"."""
    named = (
        (f"{kind}/{name}/{part}", value)
        for name, matrix_values in values.items()
        for part, value in matrix_values.items()
    )
    return Payload(tuple(to_stored_tensor(name, value) for name, value in named))


def matrix_of_part(part: str) -> str:
    """Name of the matrix of a part of a state."""
    return part.split("/", 1)[1].rsplit("/", 1)[0]


def values_from_payload(payload: Payload, kind: str, device: str) -> MatrixValues:
    """The values of one kind in a payload."""
    values = MatrixValues()
    for part in payload.parts:
        part_kind, path = part.name.split("/", 1)
        if part_kind == kind:
            name, value = path.rsplit("/", 1)
            values.setdefault(name, {})[value] = to_tensor(part).to(device)
    return values


def sum_gradients(gradients: Sequence[Payload], device: str) -> MatrixValues:
    """The sum of gradients, added in the order given."""
    total = values_from_payload(gradients[0], "gradients", device)
    for payload in gradients[1:]:
        for name, matrix_values in values_from_payload(payload, "gradients", device).items():
            for part, value in matrix_values.items():
                total[name][part] += value
    return total


def zeros_like(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the shapes of the values of one matrix."""
    return {part: torch.zeros_like(value) for part, value in values.items()}
