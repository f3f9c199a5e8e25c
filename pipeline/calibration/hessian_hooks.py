"""Sums over tokens of what goes into a model's matrices and of the gradients that come back out of them.

Three kinds of matrix, one kind of sum: the weight of a linear layer (nn.Linear, or GPT-2's Conv1D), or the rows of it that are one
projection of several; an expert's, which is some rows of a joined parameter and is recognised by where it lies when something is
multiplied with it, or with all experts at once (Llama 4); and an embedding, which is transposed, and whose inputs are ones: rows are counted.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.architectures.tensor_names import layer_of
from pipeline.errors import CheckpointError
from pipeline.models.parameter_lookup import ParameterView, find_matrix_parameter, find_parameter
from pipeline.models.stored_model import Model
from swsc_core.storage.row_blocks import RowBlocks

# by which experts are multiplied with, one by one (`@` comes as either of two) or all at once
_PRODUCTS = {torch.nn.functional.linear, Tensor.__matmul__, Tensor.matmul, torch.matmul, torch.bmm, Tensor.bmm}


@dataclass
class Sums:
    """Sums over tokens for one matrix, float32.

    Attributes:
        weighted: Σ ‖g‖² x xᵀ [n, n]; of an embedding Σ g gᵀ.
        rows: Σ g ∘ g [m]; of an embedding how often each row was looked up.
        owner: the matrix that holds `plain` for all that have the same input (q for q, k, v).
        plain: Σ x xᵀ [n, n]; None where another one is the owner; of an embedding as `weighted`.
        tokens: number of them.
    """

    weighted: Tensor
    rows: Tensor
    owner: str
    plain: Tensor | None
    tokens: int = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Tokens of a linear layer: inputs [tokens, n] and gradients by its outputs [tokens, m]."""
        squares = gradients.square()
        self.weighted.addmm_((inputs * squares.sum(dim=1, keepdim=True)).T, inputs)
        if self.plain is not None:
            self.plain.addmm_(inputs.T, inputs)
        self.rows.add_(squares.sum(dim=0))
        self.tokens += len(inputs)

    def add_lookups(self, ids: Tensor, gradients: Tensor) -> None:
        """Tokens of an embedding: rows looked up, int64 [tokens], and gradients by what was found [tokens, n]."""
        assert self.plain is not None
        self.weighted.addmm_(gradients.T, gradients)
        self.plain.addmm_(gradients.T, gradients)
        self.rows.add_(torch.bincount(ids, minlength=len(self.rows)))
        self.tokens += len(ids)


@dataclass(frozen=True)
class _Expert:
    """A matrix that is some `rows` of an expert's outputs."""

    name: str
    rows: slice | Tensor


class Hooks(TorchFunctionMode):
    """While entered, adds up what passes through the matrices that were added."""

    def __init__(self, model: Any, source: Model, sums: dict[str, Sums]) -> None:
        """`sums` is filled. `source`: what the model was loaded from."""
        super().__init__()
        self._model, self._source, self._sums = model, source, sums
        self._owners: dict[
            str, tuple[Tensor, str]
        ] = {}  # layer -> the last input of a linear layer, and who had it first
        self._experts: dict[int, list[_Expert]] = defaultdict(list)  # address of a slice -> matrices in it
        self._stacks: set[int] = set()  # addresses of the parameters that they are slices of
        self._to_hook: list[tuple[Any, Callable[..., None]]] = [(model.get_input_embeddings(), _require_grad)]
        self._handles: list[Any] = []
        self._views: dict[str, ParameterView] = {}  # of tensors that have another name in the model

    def add(self, name: str) -> None:
        """Watch the matrix `name` of the checkpoint; CheckpointError if it is of no kind known here."""
        location = self._source.location(name)
        if location.n_experts is not None:
            return self._add_expert(name, find_matrix_parameter(self._model, self._source, name))
        module = self._module(location.tensor or name)
        if isinstance(module, torch.nn.Linear) or (type(module).__name__ == "Conv1D" and location.transposed):
            self._to_hook.append((module, self._linear(name, location.row_blocks)))
        elif isinstance(module, torch.nn.Embedding):
            self._to_hook.append((module, self._embedding(name)))
        else:
            self._add_expert(name, self._views.get(name))

    def _module(self, name: str) -> Any:
        try:
            module = self._model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = self._renamed(name)
        head = self._model.get_output_embeddings()
        tied = head is not None and head.weight is self._model.get_input_embeddings().weight
        return head if tied and module is self._model.get_input_embeddings() else module

    def _renamed(self, name: str) -> Any:
        """The module whose weight the tensor `name` became, None if it became part of another."""
        view = self._views[name] = find_parameter(
            self._model, name, self._source.read(name), self._source.checkpoint.store.root
        )
        modules = (module for module in self._model.modules() if getattr(module, "weight", None) is view.parameter)
        return next(modules, None) if view.expert is None else None

    def _add_expert(self, name: str, view: ParameterView | None) -> None:
        where = self._source.checkpoint.store.root
        if view is None or view.expert is None or view.rows is None:
            raise CheckpointError(f"{where}: {name} is no linear layer of the loaded model; --exclude it")
        together = self._experts[view.parameter[view.expert].data_ptr()]
        together.append(_Expert(name, view.row_blocks.index(self._model.device) if view.row_blocks else view.rows))
        self._stacks.add(view.parameter.data_ptr())
        m, n = view.of(view.parameter).shape
        self._start(name, m, n, together[0].name, view.parameter)  # some may never get a token

    def __enter__(self) -> "Hooks":
        if self._experts:
            self._model.set_experts_implementation("eager")  # the others do not call `linear` expert by expert
            super().__enter__()  # every call of torch passes by: only where it must
        self._handles = [module.register_forward_hook(hook) for module, hook in self._to_hook]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._experts:
            super().__exit__(*error)
        self.forget()
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Let the last inputs go, and what hangs on them, once a window is done."""
        self._owners.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            inputs, weight = args[:2]
            if weight.ndim == 3 and weight.data_ptr() in self._stacks:
                for number, one in enumerate(weight):
                    for own in self._experts.get(one.data_ptr(), ()):
                        self._watch(own.name, inputs[number], out, own.rows, number)
            else:
                for own in self._experts.get(weight.data_ptr(), ()):
                    self._watch(own.name, inputs, out, own.rows)
        return out

    def _linear(self, name: str, row_blocks: RowBlocks | None) -> Callable[..., None]:
        layer = layer_of(name)
        rows = row_blocks.index(self._model.device) if row_blocks else slice(None)

        def forward(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not isinstance(output, Tensor):  # a router that is a linear layer, and chooses experts as well
                raise CheckpointError(
                    f"{self._source.checkpoint.store.root}: {name}: {type(module).__name__} does more than a linear layer, so it"
                    " cannot be calibrated; --exclude it"
                )
            last, owner = self._owners.get(layer, (None, name))
            owner = owner if last is arguments[0] else name
            self._owners[layer] = arguments[0], owner
            self._require_gradient(name, output)
            if name not in self._sums:
                self._start(
                    name, row_blocks.total if row_blocks else output.shape[-1], arguments[0].shape[-1], owner, output
                )
            self._watch(name, arguments[0], output, rows)

        return forward

    def _embedding(self, name: str) -> Callable[..., None]:
        def forward(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._require_gradient(name, output)
            if name not in self._sums:
                count, width = module.weight.shape
                self._start(name, count, width, name, output)
            ids = arguments[0].reshape(-1)

            def backward(gradient: Tensor) -> None:
                self._sums[name].add_lookups(ids, gradient.reshape(len(ids), -1).float())

            output.register_hook(backward)

        return forward

    def _require_gradient(self, name: str, output: Tensor) -> None:
        if not output.requires_grad:  # positions, or a part that the text does not run through
            where = self._source.checkpoint.store.root
            raise CheckpointError(f"{where}: no gradient comes back to {name}: it cannot be calibrated; --exclude it")

    def _watch(
        self, name: str, inputs: Tensor, output: Tensor, rows: slice | Tensor, number: int | None = None
    ) -> None:
        """Add to the sums of `name` when the gradient by `output` comes, of which `rows` are its own.

        `number`: `output` is that of all experts, of which this one has its own inputs: zeros for tokens that were not sent to it.
        """
        seen = inputs.detach().reshape(-1, inputs.shape[-1])
        sent = slice(None) if number is None else seen.any(dim=1)

        def backward(gradient: Tensor) -> None:
            own = gradient if number is None else gradient[number]
            self._sums[name].add(seen[sent].float(), own.reshape(len(seen), -1)[sent][:, rows].float())

        output.register_hook(backward)

    def _start(self, name: str, m: int, n: int, owner: str, like: Tensor) -> None:
        weighted, rows = (like.new_zeros(shape, dtype=torch.float32, requires_grad=False) for shape in ((n, n), (m,)))
        self._sums[name] = Sums(weighted, rows, owner, torch.zeros_like(weighted) if owner == name else None)


def _require_grad(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    output.requires_grad_()  # the weights do not: gradients of activations alone take half the time of both
