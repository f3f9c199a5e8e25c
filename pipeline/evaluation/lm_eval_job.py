"""The job of an lm-eval run: answers to some batches of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.lm_eval_harness import harness
from pipeline.models.loading import ModelKey


@dataclass(frozen=True)
class RequestAnswers:
    """Answers, batch by batch, and torch's name of the dtype that the model computes in."""

    answers: list[list[Any]]
    dtype: str


@dataclass(frozen=True)
class AnswerRequests:
    """Answers of a model to batches of lm-eval's requests of one kind (measure/tasks.py).

    Attributes:
        seed: of torch, for requests that are sampled; None: no seed is set.
    """

    key: ModelKey
    kind: str
    batches: Sequence[Sequence[Any]]
    seed: int | None

    def run(self, context: JobContext) -> JobOutput[RequestAnswers]:
        answerer = context.model(harness().Answerer, self.key)  # its module needs lm-eval, which may not be installed
        return JobOutput(RequestAnswers(answerer.answers(self.kind, self.batches, self.seed), answerer.dtype))
