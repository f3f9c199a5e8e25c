"""Jobs of calibration: gather second moments of some windows, add them up, take one matrix out; write text."""

from dataclasses import dataclass

import numpy as np

from pipeline.calibration.gather import Calibrator, sums_payload
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor, to_tensor
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.loading import ModelKey
from swsc_core.compressed.config_json import part_name


@dataclass(frozen=True)
class GatherHessians:
    """Sums of second moments over some windows, for the matrices of some layers: one payload a layer.

    X.weighted, X.plain and X.rows are sums over tokens, float32; `AddMoments` adds those of all windows up. The value holds digests of
    what the model was loaded from.

    Attributes:
        layers: names of the matrices of each layer.
        windows: int64 [windows, length].
        first: index of the first window in the text.
    """

    key: ModelKey
    layers: tuple[tuple[str, ...], ...]
    windows: np.ndarray
    first: int
    seed: int

    def run(self, context: JobContext) -> JobOutput[RangeDigests]:
        calibrator = context.model(Calibrator, self.key)
        names = [name for layer in self.layers for name in layer]
        sums = calibrator.gather(names, self.windows, self.first, self.seed)
        payloads = tuple(sums_payload({name: sums[name] for name in layer}) for layer in self.layers)
        return JobOutput(calibrator.read, payloads)


@dataclass(frozen=True)
class AddHessians:
    """Inputs: sums over some shards of a layer, and those over one more; the payload is their sum."""

    def run(self, context: JobContext) -> JobOutput[None]:
        before, shard = context.inputs
        pairs = zip(before.parts, shard.parts, strict=True)
        total = tuple(to_stored_tensor(old.name, to_tensor(old) + to_tensor(new)) for old, new in pairs)
        rows = zip(before.rows, shard.rows, strict=True)
        counted = tuple(old | {"tokens": old["tokens"] + new["tokens"]} for old, new in rows)
        return JobOutput(None, (Payload(total, counted),))


@dataclass(frozen=True)
class ExtractHessian:
    """Input: the sums of a layer; the payload holds those of the matrix `name`, and says which matrix holds its `plain`."""

    name: str

    def run(self, context: JobContext) -> JobOutput[None]:
        (layer,) = context.inputs
        wanted = {part_name(self.name, part) for part in ("weighted", "rows", "plain")}
        (row,) = (row for row in layer.rows if row["name"] == self.name)
        return JobOutput(None, (Payload(tuple(part for part in layer.parts if part.name in wanted), (row,)),))


@dataclass(frozen=True)
class GenerateText:
    """Windows that the model itself samples after `prefix`; the value is int64 [count, length]."""

    key: ModelKey
    count: int
    length: int
    first: int
    seed: int
    prefix: np.ndarray

    def run(self, context: JobContext) -> JobOutput[np.ndarray]:
        calibrator = context.model(Calibrator, self.key)
        return JobOutput(calibrator.write(self.count, self.length, self.first, self.seed, self.prefix))
