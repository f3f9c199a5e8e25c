"""The job of an evaluation: losses of some windows."""

from dataclasses import dataclass

import numpy as np

from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.perplexity import Evaluator
from pipeline.models.loading import ModelKey


@dataclass(frozen=True)
class WindowLosses:
    """Mean cross-entropy of each window, and torch's name of the dtype that the model computes in."""

    losses: tuple[float, ...]
    dtype: str


@dataclass(frozen=True)
class MeasureLosses:
    """Mean loss of each window under a model.

    Inputs: compressed matrices that replace the model's own, one for each of `names`.

    Attributes:
        variant: identifies the replacement; "": the model as it is.
        windows: int64 [windows, seqlen].
    """

    key: ModelKey
    windows: np.ndarray
    variant: str = ""
    names: tuple[str, ...] = ()

    def run(self, context: JobContext) -> JobOutput[WindowLosses]:
        evaluator = context.model(Evaluator, self.key)
        try:
            evaluator.load_weights(self.variant, dict(zip(self.names, context.inputs, strict=True)))
            return JobOutput(WindowLosses(tuple(evaluator.losses(self.windows)), evaluator.dtype))
        except BaseException:
            context.models.clear()  # half swapped, it would contaminate the next measurement
            raise
