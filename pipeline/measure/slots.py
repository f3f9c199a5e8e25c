"""Where a checkpoint's tensor lies in the loaded model.

Mostly it is the parameter of the same name. But transformers joins experts while it loads them: what the file calls
`experts.3.up_proj.weight` becomes some rows of slice 3 of a parameter [experts, rows, columns]. Which rows is not guessed from
names: it is where the values are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.families import layer_of


@dataclass(frozen=True)
class Slot:
    """A parameter, or `rows` of its slice `expert`."""

    parameter: torch.nn.Parameter
    expert: int | None = None
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that has the parameter's shape: a view, [m, n]."""
        return tensor if self.expert is None else tensor[self.expert, self.rows]

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Write `weight` [m, n] there."""
        self.of(self.parameter).copy_(weight)


def find_slot(model: Any, name: str, weight: Tensor, location: str) -> Slot:
    """The place of the tensor `name`, whose values at present are `weight` [m, n].

    Raises:
        CheckpointError: it is nowhere in the model.
    """
    parameters = dict(model.named_parameters())
    own = parameters.get(name)
    if own is not None and own.shape == weight.shape:
        return Slot(own)
    joined = [p for other, p in parameters.items() if p.ndim == 3 and layer_of(other) == layer_of(name)]
    for parameter in joined:
        if parameter.shape[2] == weight.shape[1]:
            wanted = weight.to(parameter.device, parameter.dtype)
            for expert, first in (parameter == wanted[0]).all(dim=2).nonzero().tolist():
                slot = Slot(parameter, expert, slice(first, first + len(wanted)))
                if torch.equal(slot.of(parameter), wanted):
                    return slot
    raise CheckpointError(f"{location}: the loaded model has no parameter for {name}; --exclude it")
