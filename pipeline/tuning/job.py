"""Jobs of tuning: divergence and gradients of some windows, a step, tuned values into a layer, the state from and to files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.integrity.digests import require_same_ranges
from pipeline.checkpoints.tensor_io import Payload, read_tensor, to_stored_tensor
from pipeline.compression.job import LayerReport, layer_output
from pipeline.compression.layer_output import LayerParts, with_errors
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.matrix_reader import MatrixReader
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from pipeline.planning.plan import LayerTask
from pipeline.storage.store import Store
from pipeline.tuning.state import TuneState, added, to_payload
from pipeline.tuning.tuner import TunedValues, TuneKey, Tuner


@dataclass(frozen=True)
class Divergence:
    """Sum over `tokens` tokens of the KL divergence of the compressed model from the original, in nats."""

    divergence: float
    tokens: int


@dataclass(frozen=True)
class MeasureDivergence:
    """Divergence on `windows`, int64 [windows, length].

    Input: the state after `step` steps; none before the first.
    """

    key: TuneKey
    step: int
    windows: np.ndarray

    def run(self, context: JobContext) -> JobOutput[Divergence]:
        tuner = _tuner_at(self.key, self.step, context)
        return JobOutput(Divergence(tuner.divergence(self.windows), self.windows.size))


@dataclass(frozen=True)
class TuneGradients:
    """As `MeasureDivergence`; the payload is its gradient with respect to all stored values."""

    key: TuneKey
    step: int
    windows: np.ndarray

    def run(self, context: JobContext) -> JobOutput[Divergence]:
        tuner = _tuner_at(self.key, self.step, context)
        divergence, gradients = tuner.gradients(self.windows)
        return JobOutput(Divergence(divergence, self.windows.size), (to_payload(gradients, "gradients"),))


def _tuner_at(key: TuneKey, step: int, context: JobContext) -> Tuner:
    """The worker's tuner with the values after `step` steps, which are the job's input unless it is the first."""
    tuner = context.model(Tuner, key)
    tuner.load_weights(step, *context.inputs)
    return tuner


@dataclass(frozen=True)
class TuneStep:
    """Inputs: the state before step number `step` (none at the first), and the gradients of its windows; the payload is the state after."""

    key: TuneKey
    step: int
    rate: float

    def run(self, context: JobContext) -> JobOutput[None]:
        state, gradients = context.inputs[: self.step > 1], context.inputs[self.step > 1 :]
        before = TuneState.of(state[0], context.device) if state else context.model(Tuner, self.key).start()
        after = before.stepped(added(gradients, context.device), self.step, self.rate)
        return JobOutput(None, (after.payload(),))


@dataclass(frozen=True)
class ApplyTuning:
    """A layer of the compressed model with tuned values; the payload is the layer's file.

    Attributes:
        form: "swsc", or "dense" for restored weights.
        rows: matrix -> its row in the report of the compressed model.
    """

    source: Store
    layer: LayerTask
    form: str
    tuned: TunedValues
    rows: Mapping[str, CompressedRow]

    def run(self, context: JobContext) -> JobOutput[LayerReport]:
        reader, parts, results = MatrixReader(self.source, context.device), LayerParts(self.form), []
        infos = [info for info, _ in self.layer.items]
        layer = self.tuned.encoded((info.name, reader.read(info).weight) for info in infos)
        for info, encoded in zip(infos, layer, strict=True):
            before = self.rows[info.name]
            require_same_ranges(info.name, dict(before.source_sha256), reader.digests)
            parts.add(info, encoded)
            row = with_errors(replace(before, tuned_sha256=self.tuned.sha256), encoded)
            results.append(MatrixResult(row, encoded.entry))
        return layer_output(parts, self.layer, reader, results, context.device)


@dataclass(frozen=True)
class KeepState:
    """Input: a state; it is the payload again, for a task that commits it."""

    def run(self, context: JobContext) -> JobOutput[None]:
        return JobOutput(None, context.inputs)


@dataclass(frozen=True)
class ReadState:
    """The payload that was committed to `file`."""

    store: Store
    file: str

    def run(self, context: JobContext) -> JobOutput[None]:
        infos = read_header(self.store, self.file)[1]
        return JobOutput(
            None, (Payload(tuple(to_stored_tensor(info.name, read_tensor(self.store, info)) for info in infos)),)
        )
