"""Where a checkpoint's tensor lies in the loaded model.

Mostly it is the parameter of the same name. But transformers renames while it loads (GPT-2's `h.0…` becomes `transformer.h.0…`,
GPT-NeoX's `embed_out` the head), by tables that change from release to release, and it joins experts: what the file calls
`experts.3.up_proj.weight` becomes some rows of slice 3 of a parameter [experts, rows, columns]. What has another name is not
guessed from names: it is where the values are. So is the way that matrices of a stack lie, which some families turn round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.artifact import Model, Place
from pipeline.model.tensor_names import layer_of
from swsc_core.pieces import Rows

_COMPARED = 16  # values of an expert's first row that are looked for before all of it is compared


@dataclass(frozen=True)
class Slot:
    """A parameter, or `rows` of its slice `expert`; or, of what it is seen turned round, the rows of a `piece`."""

    parameter: torch.nn.Parameter
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False
    piece: Rows | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that has the parameter's shape, [m, n]; a view, if it is no piece."""
        return self.piece.take(self._whole(tensor)) if self.piece else self._whole(tensor)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Write `weight` [m, n] there."""
        if self.piece:
            self.piece.put(self._whole(self.parameter), weight)
        else:
            self._whole(self.parameter).copy_(weight)

    def _whole(self, tensor: Tensor) -> Tensor:
        part = tensor if self.expert is None else tensor[self.expert, self.rows]
        return part.T if self.transposed else part


def find_matrix_slot(model: Any, source: Model, name: str) -> Slot:
    """The place of the matrix `name` of `source`, which `model` was loaded from.

    Raises:
        CheckpointError: it is nowhere in the model.
    """
    place = source.place(name)
    if place.stacked:
        return _find_stacked(model, source, name, place)
    slot = find_slot(model, place.tensor, source.read(place.tensor), source.checkpoint.store.root)
    return replace(slot, transposed=place.transposed, piece=place.rows)


def _find_stacked(model: Any, source: Model, name: str, place: Place) -> Slot:
    """The place of a matrix of a stack, or of a piece of one; no other matrix of the stack is read."""
    weight = source.read_matrix(name)
    parameters = {
        other: p for other, p in model.named_parameters() if p.ndim == 3 and p.shape[0] == place.stacked and place.rows
    }
    for other in sorted(parameters, key=lambda other: -_likeness(place.tensor, other)):
        for turned in (False, True):
            slot = _slice(parameters[other], place, turned)
            if slot and torch.equal(found := slot.of(slot.parameter), weight.to(found.device, found.dtype)):
                return slot
    raise CheckpointError(f"{source.checkpoint.store.root}: the loaded model has no parameter for {name}; --exclude it")


def _slice(parameter: torch.nn.Parameter, place: Place, turned: bool) -> Slot | None:
    """Where rows of a stack are in a parameter [stacked, a, b] whose matrices are a×b or, turned round, b×a."""
    assert place.rows
    m = parameter.shape[2 if turned else 1]
    number, first = divmod(place.rows.first, m)
    rows = replace(place.rows, first=first)
    fits = number < len(parameter) and rows.first + rows.stride * (rows.count - 1) + rows.length <= m
    return Slot(parameter, number, slice(None), turned, rows) if fits else None


def _likeness(name: str, other: str) -> int:
    """Number of words that two names have in common, at their beginnings and ends."""
    words = name.removesuffix(".weight").split("."), other.split(".")
    ends = (zip(*words, strict=False), zip(*(own[::-1] for own in words), strict=False))
    return sum(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) for pairs in ends)


def find_slot(model: Any, name: str, weight: Tensor, location: str) -> Slot:
    """The place of the tensor `name`, whose values at present are `weight` [m, n].

    Raises:
        CheckpointError: it is nowhere in the model.
    """
    parameters = dict(model.named_parameters())
    own = parameters.get(name)
    if own is not None and own.shape == weight.shape:
        return Slot(own)
    renamed = _equal(parameters, name, weight)
    if renamed is not None:
        return Slot(renamed)
    joined = [p for other, p in parameters.items() if p.ndim == 3 and layer_of(other) == layer_of(name)]
    for parameter in joined:
        if parameter.shape[2] == weight.shape[1]:
            wanted = weight.to(parameter.device, parameter.dtype)
            alike = (parameter[:, :, :_COMPARED] == wanted[0, :_COMPARED]).all(dim=2)
            for expert, first in alike.nonzero().tolist():
                slot = Slot(parameter, expert, slice(first, first + len(wanted)))
                if torch.equal(slot.of(parameter), wanted):
                    return slot
    raise CheckpointError(f"{location}: the loaded model has no parameter for {name}; --exclude it")


def _equal(parameters: Mapping[str, torch.nn.Parameter], name: str, weight: Tensor) -> torch.nn.Parameter | None:
    """The parameter of another name that has these values: the only one, or the one whose name ends alike."""
    found = {}
    for other, parameter in parameters.items():
        if parameter.shape == weight.shape:
            wanted = weight.to(parameter.device, parameter.dtype)
            if torch.equal(parameter[:1], wanted[:1]) and torch.equal(parameter, wanted):
                found[other] = parameter
    alike = [parameter for other, parameter in found.items() if other.endswith(name) or name.endswith(other)]
    only = alike if alike else list(found.values())
    return only[0] if len(only) == 1 else None
