"""Answers to requests of lm-evaluation-harness on a worker, by its own model class for transformers."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import set_torch_seed
from torch import Tensor

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey, BlockRunner
from pipeline.errors import NonFiniteLoss
from pipeline.models.loading import ModelKey, load_model, meta_model
from pipeline.models.stored_model import open_model
from pipeline.texts.windows import load_tokenizer

# Kinds of requests, by lm-eval's names. Rolling log-likelihoods are computed from the first kind.
LOGLIKELIHOOD, GENERATE = "loglikelihood", "generate_until"

# A request of lm-eval. LOGLIKELIHOOD: (texts or None, context tokens, tokens to score); GENERATE: (context, generation
# arguments).
Request = tuple[Any, ...]


class Answerer:
    """The model itself."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        model = load_model(open_model(key.location, key.known), key, device)
        with without_warnings():
            self._lm = HFLM(model, **model_arguments(key))

    @property
    def dtype(self) -> str:
        """torch's name of the model's arithmetic."""
        return str(self._lm.model.dtype).removeprefix("torch.")

    def answers(self, kind: str, batches: Sequence[list[Request]], seed: int | None) -> list[list[Any]]:
        """Answers to batches of requests: (log-likelihood, whether greedy decoding gives it) or generated texts.

        Args:
            seed: seed of torch that is set before the first batch; None: it is not set.

        Raises:
            NonFiniteLoss: a log-likelihood is NaN.
        """
        if seed is not None:
            set_torch_seed(seed)
        return [(self._scores if kind == LOGLIKELIHOOD else self._texts)(batch) for batch in batches]

    def _scores(self, batch: list[Request]) -> list[Any]:
        return _finite(self._lm._loglikelihood_tokens(batch, disable_tqdm=True), self.key.location)

    def _texts(self, batch: list[Request]) -> list[Any]:
        requests = [Instance(GENERATE, {}, request, index) for index, request in enumerate(batch)]
        texts: list[Any] = self._lm.generate_until(requests, disable_tqdm=True)
        return texts


class BlockAnswerer(BlockRunner):
    """The model in blocks: HFLM forms the token rows of a batch, and reads scores from the logits of the last block."""

    def __init__(self, key: BlockKey, device: str) -> None:
        super().__init__(key, device)
        self._location = key.model.location
        with without_warnings():
            self._lm = _GivenLogits(meta_model(key.model), **model_arguments(key.model))
        self._lm._device = torch.device(device)

    @torch.no_grad()
    def output(self, block: Block, batch: list[Request], hidden: Tensor | None) -> Any:
        """Hidden states of a batch after a block, from those before it; after the last block, its answers.

        Raises:
            NonFiniteLoss: a log-likelihood is NaN.
        """
        # None stands for the config's own choice, as in HFLM's call of the model.
        output = self.layered.run(block, self._lm.rows(batch), hidden, use_cache=None)
        return _finite(self._lm.scores(batch, output), self._location) if block.is_last else output


class _RowsFound(Exception):
    """Ends HFLM's work on a batch at its call of the model."""


class _GivenLogits(HFLM):
    """HFLM without weights, for batches that it answers with one call of the model."""

    _logits: Tensor | None = None
    _rows: Tensor | None = None

    def rows(self, batch: list[Request]) -> Tensor:
        """The token rows of a batch as the model receives them, int64 [rows, length]."""
        self._logits = None
        with contextlib.suppress(_RowsFound):
            self._loglikelihood_tokens(batch, disable_tqdm=True)
        assert self._rows is not None
        return self._rows

    def scores(self, batch: list[Request], logits: Tensor) -> list[Any]:
        """Answers to a batch for the logits of its rows."""
        self._logits = logits
        answers: list[Any] = self._loglikelihood_tokens(batch, disable_tqdm=True)
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        if self._logits is None:
            self._rows = inps
            raise _RowsFound
        return self._logits


def _finite(answers: list[Any], location: str) -> list[Any]:
    if any(math.isnan(score) for score, _ in answers):
        raise NonFiniteLoss(
            f"{location}: a log-likelihood is NaN, and no request may be dropped; use a wider --dtype, or check the"
            " model"
        )
    return answers


def model_arguments(key: ModelKey) -> dict[str, object]:
    """Arguments of HFLM, which are the same with and without weights."""
    tokenizer = load_tokenizer(key.location, key.trusted)
    return {"backend": "causal", "tokenizer": tokenizer, "batch_size": key.batch_size}


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence HFLM's warnings that it receives a model instead of a model's name."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
