"""What the inputs of a model's matrices look like, and how much their outputs matter: the statistics behind `Metric`.

For the weight W of a linear layer, input x and the gradient g of the loss by its output, over all tokens:

    plain = E[x xᵀ]      weighted = E[‖g‖² x xᵀ] / E[‖g‖²]      rows = E[g ∘ g]

The loss is that of tokens drawn from the model's own prediction, so that E[g gᵀ ⊗ x xᵀ] is the Fisher information, whose
quadratic form is the divergence of the compressed model from the original (K-FAC, Martens and Grosse 2015). Weighting tokens
by their gradient is also what tames attention sinks: a first token of huge activations counts as much as the loss depends
on it, by layer and by matrix, not as much as its square is large. But few tokens carry most of the gradient, so that the
weighted moment of a short text is a poor estimate: `Metric` is given a blend (model/moments.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, NonFiniteError
from pipeline.measure.perplexity import ModelKey, load_model
from pipeline.model.artifact import open_model
from pipeline.model.families import layer_of


@dataclass
class Sums:
    """Sums over tokens for one matrix, float32.

    Attributes:
        weighted: Σ ‖g‖² x xᵀ [n, n].
        rows: Σ g ∘ g [m].
        owner: the matrix that holds `plain` for all that have the same input (q for q, k, v).
        plain: Σ x xᵀ [n, n]; None where another one is the owner.
        tokens: number of them.
    """

    weighted: Tensor
    rows: Tensor
    owner: str
    plain: Tensor | None
    tokens: int = 0


class Calibrator:
    """A loaded model that gathers sums for some of its matrices."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        self._model = load_model(open_model(key.location), key, device)
        self._model.requires_grad_(False)
        self._device = device

    def gather(self, names: Iterable[str], windows: np.ndarray, first: int, seed: int) -> dict[str, Sums]:
        """Sums over windows, int64 [windows, length], of the matrices `names`.

        Window i draws its tokens by `seed` and `first + i`: the sums do not depend on how windows are dealt out, but
        for the order of their addition.

        Raises:
            CheckpointError: a name that is no linear layer of the loaded model.
            NonFiniteError: a window whose gradients are NaN or Inf.
        """
        modules = {name: self._linear(name) for name in names}
        sums: dict[str, Sums] = {}
        owners: dict[str, tuple[Tensor, str]] = {}
        handles = [module.register_forward_hook(_hook(name, sums, owners)) for name, module in modules.items()]
        handles.append(self._model.get_input_embeddings().register_forward_hook(_require_grad))
        try:
            for index, window in enumerate(windows, first):
                self._backward(window, torch.Generator().manual_seed((seed << 32) + index))
                _require_finite(sums, index)
        finally:
            for handle in handles:
                handle.remove()
        return sums

    @torch.inference_mode()
    def write(self, count: int, length: int, first: int, seed: int) -> np.ndarray:
        """Windows that the model writes itself, int64 [count, length]: a random token, and what it draws after it.

        Window i depends on `seed` and `first + i`, and on the windows of the same call through the last bit of their batch.
        """
        generator = torch.Generator().manual_seed((seed << 32) + first)
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        tokens = [torch.randint(vocabulary, (count, 1), generator=generator)]
        past = None
        for _ in range(length - 1):
            out = self._model(input_ids=tokens[-1].to(self._device), past_key_values=past, use_cache=True)
            past = out.past_key_values
            chances = out.logits[:, -1].float().softmax(dim=-1).cpu()
            tokens.append(torch.multinomial(chances, 1, generator=generator))
        return torch.cat(tokens, dim=1).numpy()

    def _backward(self, window: np.ndarray, generator: torch.Generator) -> None:
        ids = torch.from_numpy(np.array(window))[None].to(self._device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0]
        with torch.no_grad():  # on the CPU: a draw must not depend on the kind of device
            chances = logits.float().softmax(dim=-1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(self._device)
        torch.nn.functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()

    def _linear(self, name: str) -> torch.nn.Module:
        try:
            module = self._model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = None
        if module is self._model.get_input_embeddings() and _is_tied(self._model):
            module = self._model.get_output_embeddings()
        if not isinstance(module, torch.nn.Linear):
            raise CheckpointError(f"{self.key.location}: {name} is no linear layer of the loaded model; --exclude it")
        return module


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _require_grad(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    output.requires_grad_()  # the weights do not: gradients of activations alone take half the time of both


def _hook(name: str, sums: dict[str, Sums], owners: dict[str, tuple[Tensor, str]]) -> Any:
    """A forward hook that adds to `sums` when the gradient comes; `owners` holds the last input of each layer."""
    layer = layer_of(name)

    def forward(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        last, owner = owners.get(layer, (None, name))
        owner = owner if last is arguments[0] else name
        owners[layer] = arguments[0], owner
        inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1])

        def backward(gradient: Tensor) -> None:
            _add(sums, name, owner, inputs.float(), gradient.reshape(len(inputs), -1).float())

        output.register_hook(backward)

    return forward


def _add(sums: dict[str, Sums], name: str, owner: str, inputs: Tensor, gradients: Tensor) -> None:
    squares = gradients.square()
    if name not in sums:
        n, m = inputs.shape[1], gradients.shape[1]
        plain = inputs.new_zeros(n, n) if owner == name else None
        sums[name] = Sums(inputs.new_zeros(n, n), inputs.new_zeros(m), owner, plain)
    own = sums[name]
    own.weighted.addmm_((inputs * squares.sum(dim=1, keepdim=True)).T, inputs)
    if own.plain is not None:
        own.plain.addmm_(inputs.T, inputs)
    own.rows.add_(squares.sum(dim=0))
    own.tokens += len(inputs)


def _require_finite(sums: Mapping[str, Sums], window: int) -> None:
    for name, own in sums.items():
        if not bool(torch.isfinite(own.weighted.diagonal()).all() & torch.isfinite(own.rows).all()):
            raise NonFiniteError(f"{name}: NaN or Inf in calibration window {window}; calibrate in a wider dtype")
