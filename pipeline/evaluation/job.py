"""The job of an evaluation: losses of some windows."""

from dataclasses import dataclass

import numpy as np

from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.perplexity import Evaluator
from pipeline.models.loading import ModelKey


@dataclass(frozen=True)
class WindowLosses:
    """Mean cross-entropy of each window in nats per token, and the torch name of the dtype of the model."""

    losses: tuple[float, ...]
    dtype: str


@dataclass(frozen=True)
class MeasureLosses:
    """Mean loss of each window under a model.

    Inputs: in a sweep, compressed matrices that replace the model's weights, one for each of `names`; else none.

    Attributes:
        windows: int64 [windows, seqlen].
        variant: identifies the replacement; "" for the model without replacements.
        names: matrices that are replaced.
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
            context.models.clear()  # a model with only some weights replaced would falsify the next measurement
            raise
