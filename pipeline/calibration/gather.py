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

import numpy as np
import torch

from pipeline.calibration.hessian_hooks import Hooks, Sums
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor
from pipeline.device import deterministic, ordered_scans
from pipeline.errors import CheckpointError, NonFiniteLoss
from pipeline.models.loading import ModelKey, forward, load_model
from pipeline.models.stored_model import open_model, part_name


class Calibrator:
    """A loaded model that gathers sums for some of its matrices; `read`: digests of what it was loaded from."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        self._source = open_model(key.location, key.known)
        self.read: RangeDigests = {}
        self._model = load_model(self._source, key, device, self.read)
        self._model.requires_grad_(False)
        self._device = device

    def gather(self, names: Iterable[str], windows: np.ndarray, first: int, seed: int) -> dict[str, Sums]:
        """Sums over windows, int64 [windows, length], of the matrices `names`.

        Window i draws its tokens by `seed` and `first + i`: the sums do not depend on how windows are dealt out, but
        for the order of their addition.

        Raises:
            CheckpointError: a name that is no matrix of a linear layer, expert or embedding of the loaded model, or that
                text never reaches.
            NonFiniteLoss: a window whose gradients are NaN or Inf.
        """
        sums: dict[str, Sums] = {}
        hooks = Hooks(self._model, self._source, sums)
        names = list(names)
        for name in names:
            hooks.add(name)
        with hooks, deterministic(self._device):
            for index, window in enumerate(windows, first):
                self._backward(window, torch.Generator().manual_seed((seed << 32) + index))
                hooks.forget()
                _require_finite(sums, index)
        if unreached := [name for name in names if name not in sums]:
            where = self._source.checkpoint.store.root
            raise CheckpointError(
                f"{where}: text never reaches {unreached[0]} ({len(unreached)} in all); --exclude what is not text's"
            )
        return sums

    @torch.inference_mode()
    def write(self, count: int, length: int, first: int, seed: int, opening: np.ndarray) -> np.ndarray:
        """Windows that the model writes itself, int64 [count, length]: `opening`, or a random token, and what it draws after it.

        Window i depends on `seed` and `first + i`, and on the windows of the same call through the last bit of their batch.
        """
        generator = torch.Generator().manual_seed((seed << 32) + first)
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        random = torch.randint(vocabulary, (count, 1), generator=generator)
        tokens = [torch.from_numpy(opening).repeat(count, 1) if len(opening) else random]
        past = None
        for _ in range(length - tokens[0].shape[1]):
            with ordered_scans(self._device):
                out = forward(self._model, tokens[-1].to(self._device), past_key_values=past, use_cache=True)
            past = out.past_key_values
            chances = out.logits[:, -1].float().softmax(dim=-1).cpu()
            tokens.append(torch.multinomial(chances, 1, generator=generator))
        return torch.cat(tokens, dim=1).numpy()

    def _backward(self, window: np.ndarray, generator: torch.Generator) -> None:
        ids = torch.from_numpy(np.array(window))[None].to(self._device)
        logits = forward(self._model, ids).logits[0]
        with torch.no_grad():  # on the CPU: a draw must not depend on the kind of device
            chances = logits.float().softmax(dim=-1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(self._device)
        torch.nn.functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()


def sums_payload(sums: dict[str, Sums]) -> Payload:
    """The sums of some matrices, to be handed on."""
    parts = [
        to_stored_tensor(part_name(name, part), tensor)
        for name, own in sums.items()
        for part, tensor in (("weighted", own.weighted), ("plain", own.plain), ("rows", own.rows))
        if tensor is not None
    ]
    rows = tuple({"name": name, "tokens": own.tokens, "owner": own.owner} for name, own in sums.items())
    return Payload(tuple(parts), rows)


def _require_finite(sums: Mapping[str, Sums], window: int) -> None:
    for name, own in sums.items():
        if not bool(torch.isfinite(own.weighted.diagonal()).all() & torch.isfinite(own.rows).all()):
            raise NonFiniteLoss(f"{name}: NaN or Inf in calibration window {window}; calibrate in a wider dtype")
