"""Where tuning has come to: stored values of all matrices, and the running means by which the next step is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor, to_tensor
from swsc_core.finetune import AdamState, adam_step, step_unit

Values = dict[str, dict[str, Tensor]]  # tensor -> name of a value (swsc_core/finetune.py) -> float32


@dataclass(frozen=True)
class TuneState:
    """Values, and for each of them the running mean of its gradients and of their squares."""

    values: Values
    means: Values
    squares: Values

    @classmethod
    def start(cls, values: Values) -> "TuneState":
        """Before the first step."""
        zeros = {name: {part: torch.zeros_like(value) for part, value in own.items()} for name, own in values.items()}
        return cls(values, zeros, zeros)

    def stepped(self, gradients: Values, step: int, rate: float) -> "TuneState":
        """After step number `step`, from 1 on, by at most about `rate` of each value's unit."""
        values, means, squares = Values(), Values(), Values()
        for name, own in self.values.items():
            values[name], means[name], squares[name] = {}, {}, {}
            for part, value in own.items():
                state = AdamState(value, self.means[name][part], self.squares[name][part])
                values[name][part], means[name][part], squares[name][part] = adam_step(
                    state, gradients[name][part], step_unit(part, value), step, rate
                )
        return TuneState(values, means, squares)

    def payload(self) -> Payload:
        """As it travels and is kept."""
        kinds = {"values": self.values, "means": self.means, "squares": self.squares}
        return Payload(tuple(part for kind, values in kinds.items() for part in to_payload(values, kind).parts))

    @classmethod
    def of(cls, payload: Payload, device: str) -> "TuneState":
        return cls(*(from_payload(payload, kind, device) for kind in ("values", "means", "squares")))


def to_payload(values: Values, kind: str) -> Payload:
    """Parts named "kind/tensor/name"."""
    named = ((f"{kind}/{name}/{part}", value) for name, own in values.items() for part, value in own.items())
    return Payload(tuple(to_stored_tensor(name, value) for name, value in named))


def from_payload(payload: Payload, kind: str, device: str) -> Values:
    """The values of one kind in a payload."""
    values = Values()
    for part in payload.parts:
        found, rest = part.name.split("/", 1)
        if found == kind:
            name, value = rest.rsplit("/", 1)
            values.setdefault(name, {})[value] = to_tensor(part).to(device)
    return values


def added(gradients: Sequence[Payload], device: str) -> Values:
    """The sum of gradients, in the order given."""
    total = from_payload(gradients[0], "gradients", device)
    for payload in gradients[1:]:
        for name, own in from_payload(payload, "gradients", device).items():
            for part, value in own.items():
                total[name][part] += value
    return total
