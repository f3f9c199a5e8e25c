"""A loaded model that gathers the statistics behind `Metric`: Hessians of its matrices and gradients of their outputs.

For a linear layer with weight [m, n], input x and gradient g of the loss with respect to its output, over all tokens of
the text:

    plain = E[x xᵀ]      weighted = E[‖g‖² x xᵀ] / E[‖g‖²]      rows = E[g ∘ g]

`plain` is the Hessian (second moment of inputs) of GPTQ; `weighted` weights each token by its gradient. Both are [n,
n], `rows` is [m]. The loss is the cross-entropy of tokens that are sampled from the model's own prediction. E[g gᵀ ⊗ x
xᵀ] is then the Fisher information, whose quadratic form approximates the KL divergence of the compressed model from the
original (K-FAC, Martens and Grosse 2015). The weighting also limits attention sinks: a first token with huge
activations counts as much as the loss depends on it, per layer and per matrix. Few tokens carry most of the gradient,
however, so that the weighted Hessian of a short text is a poor estimate. `Metric` therefore receives a mixture of both
(`hessian_store.blend`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from pipeline.calibration.hessian_hooks import HessianHooks, HessianSums
from pipeline.calibration.hessian_store import HessianRow
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor
from pipeline.device import deterministic, ordered_scans
from pipeline.errors import CheckpointError, NonFiniteLoss
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.stored_model import open_model
from swsc_core.compressed.config_json import part_name


class Calibrator:
    """A loaded model that gathers sums for some of its matrices, and that can generate text.

    Attributes:
        source_digests: digests of the byte ranges that the model was loaded from.
    """

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        self._source = open_model(key.location, key.known)
        self.source_digests: RangeDigests = {}
        self._model = load_model(self._source, key, device, self.source_digests)
        self._model.requires_grad_(False)
        self._device = device

    def gather(self, names: Iterable[str], windows: np.ndarray, first: int, seed: int) -> dict[str, HessianSums]:
        """Sums over `windows`, int64 [windows, seqlen], for the matrices `names`.

        The tokens of window i are drawn with `seed` and `first + i`. Sums over disjoint sets of windows therefore add
        up to the sum over their union, except for rounding.

        Raises:
            CheckpointError: a name is not a matrix of a linear layer, expert or embedding of the loaded model, or no
                token of a text reaches it.
            NonFiniteLoss: the gradients of a window are NaN or Inf.
        """
        sums: dict[str, HessianSums] = {}
        hooks = HessianHooks(self._model, self._source, sums)
        names = list(names)
        for name in names:
            hooks.add(name)
        with hooks, deterministic(self._device):
            for index, window in enumerate(windows, first):
                self._backward(window, torch.Generator().manual_seed((seed << 32) + index))
                hooks.forget_inputs()
                require_finite(sums, index)
        require_reached(names, sums, self._source.checkpoint.store.root)
        return sums

    @torch.inference_mode()
    def generate(self, count: int, length: int, first: int, seed: int, prefix: np.ndarray) -> np.ndarray:
        """Windows that the model samples itself, int64 [count, length].

        Each window starts with `prefix` or, if that is empty, with a random token. Window i depends on `seed` and
        `first + i`; the other windows of the same call may change the last bit of its logits, because they share a
        batch.
        """
        generator = torch.Generator().manual_seed((seed << 32) + first)
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        random = torch.randint(vocabulary, (count, 1), generator=generator)
        tokens = [torch.from_numpy(prefix).repeat(count, 1) if len(prefix) else random]
        past = None
        for _ in range(length - tokens[0].shape[1]):
            with ordered_scans(self._device):
                output = forward(self._model, tokens[-1].to(self._device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(dim=-1).cpu()
            tokens.append(torch.multinomial(probabilities, 1, generator=generator))
        return torch.cat(tokens, dim=1).numpy()

    def _backward(self, window: np.ndarray, generator: torch.Generator) -> None:
        ids = torch.from_numpy(np.array(window))[None].to(self._device)
        backward_from_prediction(forward(self._model, ids).logits[0], generator)


def backward_from_prediction(logits: Tensor, generator: torch.Generator) -> None:
    """Backward pass from the cross-entropy of tokens that are drawn from a model's own prediction.

    Args:
        logits: of one window, [length, vocabulary].
        generator: on the CPU, because samples must not depend on the kind of device.
    """
    with torch.no_grad():
        probabilities = logits.float().softmax(dim=-1).cpu()
        targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    torch.autograd.backward(loss)


def sums_payload(sums: Mapping[str, HessianSums]) -> Payload:
    """The sums of some matrices as a payload, with one `HessianRow` for each."""
    parts = [
        to_stored_tensor(part_name(name, part), tensor)
        for name, matrix_sums in sums.items()
        for part, tensor in matrix_sums.tensors().items()
    ]
    rows = tuple(asdict(HessianRow(name, each.tokens, each.owner)) for name, each in sums.items())
    return Payload(tuple(parts), rows)


def require_reached(names: Iterable[str], sums: Mapping[str, HessianSums], location: str) -> None:
    """Raise CheckpointError if a matrix has no sums, because no token of a text reaches it."""
    if unreached := [name for name in names if name not in sums]:
        raise CheckpointError(
            f"{location}: {len(unreached)} selected matrices receive no token of a text, {unreached[0]} first;"
            " exclude matrices that process no text with --exclude"
        )


def require_finite(sums: Mapping[str, HessianSums], window: int) -> None:
    """Raise NonFiniteLoss if sums hold NaN or Inf after a window."""
    for name, each in sums.items():
        if not bool(torch.isfinite(each.weighted.diagonal()).all() & torch.isfinite(each.rows).all()):
            raise NonFiniteLoss(
                f"{name}: NaN or Inf in calibration window {window}; choose a wider dtype with --calibration-dtype"
            )
