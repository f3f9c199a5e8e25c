"""The jobs of an lm-eval run: answers to some batches of requests, by a whole model or by one block after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey, hidden_payload, hidden_states
from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.lm_eval_harness import answerers
from pipeline.models.loading import ModelKey


@dataclass(frozen=True)
class RequestAnswers:
    """Answers, batch by batch, and the torch name of the dtype that the model computes in."""

    answers: list[list[Any]]
    dtype: str


@dataclass(frozen=True)
class AnswerRequests:
    """Answer batches of requests of lm-eval.

    Attributes:
        kind: type of all requests, LOGLIKELIHOOD or GENERATE of lm_eval_answerer.py.
        seed: of torch, for requests that are sampled; None: no seed is set.
    """

    key: ModelKey
    kind: str
    batches: Sequence[Sequence[Any]]
    seed: int | None

    def run(self, context: JobContext) -> JobOutput[RequestAnswers]:
        # `answerers` imports the module only here, because lm-eval may not be installed.
        answerer = context.model(answerers().Answerer, self.key)
        return JobOutput(RequestAnswers(answerer.answers(self.kind, self.batches, self.seed), answerer.dtype))


@dataclass(frozen=True)
class ScoreInBlock:
    """Hidden states of batches of LOGLIKELIHOOD requests after one block, or their answers after the last one.

    Input: their hidden states before the block; none for the first block.

    Attributes:
        upcoming: block that the worker will probably run next; it is read meanwhile.
    """

    key: BlockKey
    block: Block
    batches: Sequence[Sequence[Any]]
    upcoming: Block | None = None

    def run(self, context: JobContext) -> JobOutput[RequestAnswers]:
        answerer = context.model(answerers().BlockAnswerer, self.key)
        answerer.load(self.block, self.upcoming)
        states = hidden_states(context.inputs[0], context.device) if context.inputs else [None] * len(self.batches)
        batches = zip(self.batches, states, strict=True)
        outputs = [answerer.output(self.block, batch, hidden) for batch, hidden in batches]
        if self.block.is_last:
            return JobOutput(RequestAnswers(outputs, answerer.dtype))
        return JobOutput(RequestAnswers([], answerer.dtype), (hidden_payload(outputs),))
