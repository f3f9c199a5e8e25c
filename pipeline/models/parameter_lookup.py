"""Parameter lookup: the part of a loaded model's parameter that holds a tensor, or a matrix, of the checkpoint.

Usually that is the parameter of the same name. But transformers renames tensors while it loads them (`h.0…` of GPT-2 is
loaded as `transformer.h.0…`, `embed_out` of GPT-NeoX as the head), by tables that change from release to release. It
also fuses experts: `experts.3.up_proj.weight` of a file is loaded into some rows of slice 3 of a parameter [experts,
rows, columns]. Because names are unreliable, a parameter of another name is identified by its values, and so is the
layout of stacked matrices, which some families transpose.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.tensor_names import layer_of
from pipeline.errors import CheckpointError
from pipeline.models.stored_model import Model
from swsc_core.storage.location import MatrixLocation
from swsc_core.storage.row_blocks import RowBlocks

# Values of an expert's first row that are compared before the whole matrix is.
_COMPARED = 16


@dataclass(frozen=True)
class ParameterView:
    """Location of a weight inside a loaded parameter: optional expert index, row range, transpose, row blocks.

    They apply in this order: `parameter[expert, rows]`, transposed, of which the matrix is `row_blocks`.
    """

    parameter: torch.nn.Parameter
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False
    row_blocks: RowBlocks | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part [m, n] of a tensor of the parameter's shape: a copy if there are row blocks, else a view."""
        return self.row_blocks.take(self._fused(tensor)) if self.row_blocks else self._fused(tensor)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Write `weight` [m, n] into this part of the parameter."""
        if self.row_blocks:
            self.row_blocks.put(self._fused(self.parameter), weight)
        else:
            self._fused(self.parameter).copy_(weight)

    def _fused(self, tensor: Tensor) -> Tensor:
        part = tensor if self.expert is None else tensor[self.expert, self.rows]
        return part.T if self.transposed else part


def find_matrix_parameter(model: Any, source: Model, name: str) -> ParameterView:
    """Return the part of a parameter that holds the matrix `name` of `source`, from which `model` was loaded.

    Raises:
        CheckpointError: no parameter holds it.
    """
    location = source.location(name)
    if location.n_experts is not None:
        return _find_in_stack(model, source, name, location)
    tensor = location.tensor or name
    view = find_parameter(model, tensor, source.read(tensor), source.checkpoint.store.root)
    return replace(view, transposed=location.transposed, row_blocks=location.row_blocks)


def _find_in_stack(model: Any, source: Model, name: str, location: MatrixLocation) -> ParameterView:
    """The part that holds the matrix of an expert, or rows of it. No other matrix of the stack is read."""
    weight, tensor = source.read_matrix(name), location.tensor or name
    parameters = ((path, p) for path, p in model.named_parameters() if not p.is_meta)
    stacks = {path: p for path, p in parameters if p.ndim == 3 and p.shape[0] == location.n_experts}
    for path in sorted(stacks, key=lambda path: -_common_words(tensor, path)):
        for transposed in (False, True):
            view = _in_stack(stacks[path], location, transposed)
            if view and torch.equal(part := view.of(view.parameter), weight.to(part.device, part.dtype)):
                return view
    raise CheckpointError(f"{source.checkpoint.store.root}: the loaded model has no parameter for {name}; --exclude it")


def _in_stack(parameter: torch.nn.Parameter, location: MatrixLocation, transposed: bool) -> ParameterView | None:
    """The rows of a stack in a parameter [experts, a, b] whose matrices are [a, b] or, transposed, [b, a]."""
    m = parameter.shape[2 if transposed else 1]
    number, rows = location.expert(m), location.rows_in_expert(m)
    if number is None or rows is None or number >= len(parameter) or rows.end > m:
        return None
    return ParameterView(parameter, number, slice(None), transposed, rows)


def _common_words(name: str, path: str) -> int:
    """Number of words that the names of a tensor and of a parameter share at their beginnings and ends."""
    words = name.removesuffix(".weight").split("."), path.split(".")
    ends = (zip(*words, strict=False), zip(*(each[::-1] for each in words), strict=False))
    return sum(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) for pairs in ends)


def find_parameter(model: Any, name: str, weight: Tensor, location: str) -> ParameterView:
    """Return the parameter, or the part of one, that holds the tensor `name`.

    Args:
        model: the loaded model.
        name: name of the tensor in the checkpoint.
        weight: [m, n], its present values.
        location: where the model was loaded from, for messages.

    Raises:
        CheckpointError: no parameter holds the tensor.
    """
    parameters = {path: p for path, p in model.named_parameters() if not p.is_meta}
    same_name = parameters.get(name)
    if same_name is not None and same_name.shape == weight.shape:
        return ParameterView(same_name)
    renamed = _equal(parameters, name, weight)
    if renamed is not None:
        return ParameterView(renamed)
    stacks = [p for path, p in parameters.items() if p.ndim == 3 and layer_of(path) == layer_of(name)]
    for parameter in stacks:
        if parameter.shape[2] == weight.shape[1] and (view := _rows_of_expert(parameter, weight)):
            return view
    raise CheckpointError(f"{location}: the loaded model has no parameter for {name}; --exclude it")


def _rows_of_expert(parameter: torch.nn.Parameter, weight: Tensor) -> ParameterView | None:
    """The rows of a matrix in a stack [experts, rows, n] that equal `weight` [m, n]."""
    expected = weight.to(parameter.device, parameter.dtype)
    candidates = (parameter[:, :, :_COMPARED] == expected[0, :_COMPARED]).all(dim=2)
    for expert, first in candidates.nonzero().tolist():
        view = ParameterView(parameter, expert, slice(first, first + len(expected)))
        if torch.equal(view.of(parameter), expected):
            return view
    return None


def _equal(parameters: Mapping[str, torch.nn.Parameter], name: str, weight: Tensor) -> torch.nn.Parameter | None:
    """The parameter of another name with equal values: the only one, or the only one whose name has the same end."""
    equal = {}
    for path, parameter in parameters.items():
        if parameter.shape == weight.shape:
            expected = weight.to(parameter.device, parameter.dtype)
            if torch.equal(parameter[:1], expected[:1]) and torch.equal(parameter, expected):
                equal[path] = parameter
    same_end = [parameter for path, parameter in equal.items() if path.endswith(name) or name.endswith(path)]
    candidates = same_end if same_end else list(equal.values())
    return candidates[0] if len(candidates) == 1 else None
