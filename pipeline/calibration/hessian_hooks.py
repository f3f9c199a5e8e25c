"""Hooks that sum up the inputs of a model's matrices and the gradients of their outputs, over tokens.

Three kinds of matrix use the same sums:

- the weight of a linear layer (nn.Linear, or GPT-2's Conv1D), or rows of it that are one projection of a fused weight;
- a matrix of an expert: rows of a parameter that stacks experts. A call that multiplies with it is recognised by the
  address of the expert's slice or, if the call multiplies with all experts at once (Llama 4), by the address of the
  parameter;
- an embedding. It is treated as transposed and its inputs as ones, so that its rows are counted.
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

# Functions that multiply with experts, one by one (`@` dispatches to either of two) or all at once.
_PRODUCTS = {torch.nn.functional.linear, Tensor.__matmul__, Tensor.matmul, torch.matmul, torch.bmm, Tensor.bmm}


@dataclass
class HessianSums:
    """Sums over tokens for one matrix [m, n], float32, with inputs x and output gradients g.

    Attributes:
        weighted: Σ ‖g‖² x xᵀ [n, n]; of an embedding Σ g gᵀ.
        rows: Σ g ∘ g [m]; of an embedding the number of lookups of each row.
        owner: matrix that stores `plain` for all matrices with the same input (q for q, k and v).
        plain: Σ x xᵀ [n, n], None if another matrix is the owner; of an embedding equal to `weighted`.
        tokens: number of tokens.
    """

    weighted: Tensor
    rows: Tensor
    owner: str
    plain: Tensor | None
    tokens: int = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add tokens of a linear layer: inputs [tokens, n] and output gradients [tokens, m]."""
        squares = gradients.square()
        self.weighted.addmm_((inputs * squares.sum(dim=1, keepdim=True)).T, inputs)
        if self.plain is not None:
            self.plain.addmm_(inputs.T, inputs)
        self.rows.add_(squares.sum(dim=0))
        self.tokens += len(inputs)

    def add_lookups(self, ids: Tensor, gradients: Tensor) -> None:
        """Add tokens of an embedding: row indices, int64 [tokens], and gradients of the looked-up rows [tokens, n]."""
        assert self.plain is not None
        self.weighted.addmm_(gradients.T, gradients)
        self.plain.addmm_(gradients.T, gradients)
        self.rows.add_(torch.bincount(ids, minlength=len(self.rows)))
        self.tokens += len(ids)

    def add_sums(self, other: "HessianSums") -> None:
        """Add the sums over other tokens of the same matrix."""
        for name, tensor in self.tensors().items():
            tensor.add_(other.tensors()[name])
        self.tokens += other.tokens

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; `plain` is missing if another matrix is its owner."""
        sums = {"weighted": self.weighted, "plain": self.plain, "rows": self.rows}
        return {name: tensor for name, tensor in sums.items() if tensor is not None}


@dataclass(frozen=True)
class _OutputRows:
    """A matrix, and the `rows` of a layer's or expert's outputs that it produces."""

    name: str
    rows: slice | Tensor


class HessianHooks(TorchFunctionMode):
    """Context manager that adds to the sums of the registered matrices in every forward and backward pass."""

    def __init__(self, model: Any, source: Model, sums: dict[str, HessianSums]) -> None:
        """`sums` receives the results by matrix name; `model` was loaded from `source`."""
        super().__init__()
        self._model, self._source, self._sums = model, source, sums
        # layer -> the last input of one of its linear layers, and the first matrix with that input
        self._owners: dict[str, tuple[Tensor, str]] = {}
        # address of an expert's slice -> matrices in it
        self._experts: dict[int, list[_OutputRows]] = defaultdict(list)
        # addresses of the parameters with these slices
        self._stacks: set[int] = set()
        self._to_hook: list[tuple[Any, Callable[..., None]]] = [(model.get_input_embeddings(), _require_grad)]
        self._handles: list[Any] = []
        # views of tensors that have another name in the model
        self._views: dict[str, ParameterView] = {}

    def add(self, name: str) -> None:
        """Register the matrix `name` of the checkpoint. Raises CheckpointError for a matrix of an unknown kind."""
        location = self._source.location(name)
        if location.n_experts is not None:
            return self._add_expert(name, find_matrix_parameter(self._model, self._source, name))
        module = self._module(location.tensor or name)
        if isinstance(module, torch.nn.Linear) or (type(module).__name__ == "Conv1D" and location.transposed):
            rows = location.row_blocks.index(module.weight.device) if location.row_blocks else slice(None)
            self._to_hook.append((module, self._linear_hook(_OutputRows(name, rows))))
        elif isinstance(module, torch.nn.Embedding):
            self._to_hook.append((module, self._embedding_hook(name)))
        else:
            self._add_expert(name, self._views.get(name))

    def _module(self, name: str) -> Any:
        try:
            module = self._model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = self._renamed_module(name)
        head = self._model.get_output_embeddings()
        tied = head is not None and head.weight is self._model.get_input_embeddings().weight
        return head if tied and module is self._model.get_input_embeddings() else module

    def _renamed_module(self, name: str) -> Any:
        """The module whose weight holds the tensor `name`; None if the tensor is only a part of a parameter."""
        tensor, location = self._source.read(name), self._source.checkpoint.store.root
        view = self._views[name] = find_parameter(self._model, name, tensor, location)
        modules = (module for module in self._model.modules() if getattr(module, "weight", None) is view.parameter)
        return next(modules, None) if view.expert is None else None

    def _add_expert(self, name: str, view: ParameterView | None) -> None:
        if view is None or view.expert is None or view.rows is None:
            raise self._error(name, "is not the weight of a linear layer of the loaded model")
        matrices = self._experts[view.parameter[view.expert].data_ptr()]
        device = view.parameter.device
        matrices.append(_OutputRows(name, view.row_blocks.index(device) if view.row_blocks else view.rows))
        self._stacks.add(view.parameter.data_ptr())
        m, n = view.of(view.parameter).shape
        # The sums exist from the start, because an expert may receive no token.
        if name not in self._sums:
            self._start_sums(name, m, n, matrices[0].name, view.parameter)

    def __enter__(self) -> "HessianHooks":
        if self._experts:
            # Only "eager" calls `linear` for one expert at a time. The mode intercepts every call of torch, so it is
            # used only here.
            self._model.set_experts_implementation("eager")
            enter: Any = super().__enter__
            enter()
        self._handles = [module.register_forward_hook(hook) for module, hook in self._to_hook]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._experts:
            leave: Any = super().__exit__
            leave(*error)
        self.forget_inputs()
        for handle in self._handles:
            handle.remove()

    def forget_inputs(self) -> None:
        """Release the inputs of the last window, and the activations that they keep alive."""
        self._owners.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            inputs, weight = args[:2]
            if weight.ndim == 3 and weight.data_ptr() in self._stacks:
                for number, expert in enumerate(weight):
                    for matrix in self._experts.get(expert.data_ptr(), ()):
                        self._watch(matrix, inputs[number], output, number)
            else:
                for matrix in self._experts.get(weight.data_ptr(), ()):
                    self._watch(matrix, inputs, output)
        return output

    def _linear_hook(self, matrix: _OutputRows) -> Callable[..., None]:
        name, rows = matrix.name, matrix.rows
        layer = layer_of(name)

        def forward(module: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
            if not isinstance(output, Tensor):  # for example a router that is a linear layer and also selects experts
                raise self._error(name, f"{type(module).__name__} returns more than the output of a linear layer")
            inputs = arguments[0]
            last_inputs, owner = self._owners.get(layer, (None, name))
            owner = owner if last_inputs is inputs else name
            self._owners[layer] = inputs, owner
            self._require_gradient(name, output)
            if name not in self._sums:
                m = output.shape[-1] if isinstance(rows, slice) else len(rows)
                self._start_sums(name, m, inputs.shape[-1], owner, output)
            self._watch(matrix, inputs, output)

        return forward

    def _embedding_hook(self, name: str) -> Callable[..., None]:
        def forward(module: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
            self._require_gradient(name, output)
            if name not in self._sums:
                count, width = module.weight.shape
                self._start_sums(name, count, width, name, output)
            ids = arguments[0].reshape(-1)

            def backward(gradient: Tensor) -> None:
                self._sums[name].add_lookups(ids, gradient.reshape(len(ids), -1).float())

            output.register_hook(backward)

        return forward

    def _require_gradient(self, name: str, output: Tensor) -> None:
        if not output.requires_grad:  # for example positions, or a part of the model that text does not reach
            raise self._error(name, "its output receives no gradient")

    def _error(self, name: str, reason: str) -> CheckpointError:
        location = self._source.checkpoint.store.root
        return CheckpointError(f"{location}: {name} cannot be calibrated: {reason}; exclude it with --exclude")

    def _watch(self, matrix: _OutputRows, inputs: Tensor, output: Any, expert: int | None = None) -> None:
        """Add to the sums of `matrix` once the gradient of `output` arrives.

        With `expert`, `output` holds the outputs of all experts, and `inputs` are those of this expert: zero for tokens
        that were routed elsewhere.
        """
        flat_inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        routed = slice(None) if expert is None else flat_inputs.any(dim=1)

        def backward(gradient: Tensor) -> None:
            of_expert = gradient if expert is None else gradient[expert]
            gradients = of_expert.reshape(len(flat_inputs), -1)[routed][:, matrix.rows]
            self._sums[matrix.name].add(flat_inputs[routed].float(), gradients.float())

        output.register_hook(backward)

    def _start_sums(self, name: str, m: int, n: int, owner: str, like: Tensor) -> None:
        weighted, rows = (like.new_zeros(shape, dtype=torch.float32, requires_grad=False) for shape in ((n, n), (m,)))
        self._sums[name] = HessianSums(weighted, rows, owner, torch.zeros_like(weighted) if owner == name else None)


def _require_grad(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    """Hook of the input embedding: makes all later activations require gradients.

    The weights do not require any, because gradients of activations alone take half the time.
    """
    output.requires_grad_()
