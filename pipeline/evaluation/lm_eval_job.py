"""The job of an lm-eval run: answers to some batches of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.lm_eval_harness import harness
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
        kind: type of all requests, LOGLIKELIHOOD or GENERATE of lm_eval_tasks.py.
        seed: of torch, for requests that are sampled; None: no seed is set.
    """

    key: ModelKey
    kind: str
    batches: Sequence[Sequence[Any]]
    seed: int | None

    def run(self, context: JobContext) -> JobOutput[RequestAnswers]:
        # `harness` imports the module only here, because lm-eval may not be installed.
        answerer = context.model(harness().Answerer, self.key)
        return JobOutput(RequestAnswers(answerer.answers(self.kind, self.batches, self.seed), answerer.dtype))
