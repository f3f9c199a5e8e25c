"""Jobs of tuning: divergence and gradients of windows, one step, the tuned file of a layer, state files."""

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
from pipeline.models.stored_model import open_model, opened_once
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from pipeline.planning.tasks import LayerTask
from pipeline.storage.store import Store
from pipeline.tuning.matrices import load_tunable
from pipeline.tuning.state import TuneState, matrix_of_part, sum_gradients, values_to_payload
from pipeline.tuning.tuner import TunedValues, TuneKey, Tuner
from swsc_core.finetune import tunable_values


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the compressed model from the original, in nats, summed over `tokens` tokens."""

    divergence: float
    tokens: int


@dataclass(frozen=True)
class MeasureDivergence:
    """Divergence on `windows`, int64 [windows, seqlen].

    Input: the state after `step` steps, or nothing before the first step.
    """

    key: TuneKey
    step: int
    windows: np.ndarray

    def run(self, context: JobContext) -> JobOutput[Divergence]:
        tuner = _tuner_at(self.key, self.step, context)
        return JobOutput(Divergence(tuner.divergence(self.windows), self.windows.size))


@dataclass(frozen=True)
class TuneGradients:
    """Divergence on `windows`, and as payload its gradient with respect to all stored values.

    Input: the state after `step` steps, or nothing before the first step.
    """

    key: TuneKey
    step: int
    windows: np.ndarray

    def run(self, context: JobContext) -> JobOutput[Divergence]:
        tuner = _tuner_at(self.key, self.step, context)
        divergence, gradients = tuner.gradients(self.windows)
        return JobOutput(Divergence(divergence, self.windows.size), (values_to_payload(gradients, "gradients"),))


def _tuner_at(key: TuneKey, step: int, context: JobContext) -> Tuner:
    """The worker's tuner with the values after `step` steps, which are the job's input unless `step` is 0."""
    tuner = context.model(Tuner, key)
    tuner.load_weights(step, *context.inputs)
    return tuner


@dataclass(frozen=True)
class TuneStep:
    """One step of the optimizer. The payload is the state after step number `step`, which is counted from 1.

    Inputs: the state before the step, except for the first step, and the gradients of the windows in their order.

    Attributes:
        rate: largest change of a value in units of its size.
        names: the matrices of the state; None: all.
    """

    key: TuneKey
    step: int
    rate: float
    names: tuple[str, ...] | None = None

    def run(self, context: JobContext) -> JobOutput[None]:
        state, gradients = context.inputs[: self.step > 1], context.inputs[self.step > 1 :]
        before = TuneState.from_payload(state[0], context.device) if state else self._start(context)
        after = before.stepped(sum_gradients(gradients, context.device), self.step, self.rate)
        return JobOutput(None, (after.to_payload(),))

    def _start(self, context: JobContext) -> TuneState:
        if self.names is None:
            return TuneState.start(context.model(Tuner, self.key).matrices.stored_values())
        model = open_model(self.key.compressed)
        tunables = ((name, load_tunable(model, name, context.device)) for name in self.names)
        return TuneState.start({name: tunable_values(tunable.matrix) for name, tunable in tunables})


@dataclass(frozen=True)
class ApplyTuning:
    """Write the tuned values of a layer into its matrices. The payload is the layer's file.

    Attributes:
        source: the original model, which errors are measured against.
        form: "swsc" for compressed matrices, "dense" for restored weights.
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
        model, sha256 = context.model(opened_once, self.tuned.compressed), self.tuned.sha256
        layer = self.tuned.encoded(model, ((info.name, reader.read(info).weight) for info in infos))
        for info, encoded in zip(infos, layer, strict=True):
            before = self.rows[info.name]
            require_same_ranges(info.name, dict(before.source_sha256), reader.digests)
            parts.add(info, encoded)
            row = with_errors(replace(before, tuned_sha256=sha256), encoded)
            results.append(MatrixResult(row, encoded.entry))
        return layer_output(parts, self.layer, reader, results, context.device)


@dataclass(frozen=True)
class KeepState:
    """Return the parts of all inputs as one payload, for a task that commits it to a file."""

    def run(self, context: JobContext) -> JobOutput[None]:
        return JobOutput(None, (Payload(tuple(part for state in context.inputs for part in state.parts)),))


@dataclass(frozen=True)
class ReadState:
    """Read a state that was committed to `file`, of some matrices or of all. It is the payload."""

    store: Store
    file: str
    names: tuple[str, ...] | None = None

    def run(self, context: JobContext) -> JobOutput[None]:
        infos = read_header(self.store, self.file)[1]
        if self.names is not None:
            infos = [info for info in infos if matrix_of_part(info.name) in set(self.names)]
        parts = (to_stored_tensor(info.name, read_tensor(self.store, info)) for info in infos)
        return JobOutput(None, (Payload(tuple(parts)),))
