"""Jobs of calibration: gather sums over some windows, add them up, extract one matrix, generate text."""

from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline.calibration.gather import Calibrator, sums_payload
from pipeline.calibration.hessian_store import HessianRow
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor, to_tensor
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.loading import ModelKey
from swsc_core.compressed.config_json import part_name


@dataclass(frozen=True)
class GatherHessians:
    """Gather the sums of some layers over some windows. The job returns one payload per layer.

    A payload holds the float32 sums X.weighted, X.plain and X.rows of each matrix X; `AddHessians` adds the sums of
    other windows. The value holds digests of the bytes that the model was loaded from.

    Attributes:
        layers: names of the matrices of each layer.
        windows: int64 [windows, seqlen].
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
        return JobOutput(calibrator.source_digests, payloads)


@dataclass(frozen=True)
class AddHessians:
    """Add two payloads of sums of the same layer. Inputs: the sum of the earlier shards, and the next shard."""

    def run(self, context: JobContext) -> JobOutput[None]:
        total, shard = context.inputs
        part_pairs = zip(total.parts, shard.parts, strict=True)
        parts = tuple(to_stored_tensor(a.name, to_tensor(a) + to_tensor(b)) for a, b in part_pairs)
        row_pairs = zip(map(HessianRow.from_json, total.rows), map(HessianRow.from_json, shard.rows), strict=True)
        rows = tuple(asdict(replace(a, tokens=a.tokens + b.tokens)) for a, b in row_pairs)
        return JobOutput(None, (Payload(parts, rows),))


@dataclass(frozen=True)
class ExtractHessian:
    """Extract the sums of one matrix. Input: the sums of its layer."""

    name: str

    def run(self, context: JobContext) -> JobOutput[None]:
        (layer,) = context.inputs
        names = {part_name(self.name, part) for part in ("weighted", "rows", "plain")}
        (row,) = (row for row in layer.rows if row["name"] == self.name)
        return JobOutput(None, (Payload(tuple(part for part in layer.parts if part.name in names), (row,)),))


@dataclass(frozen=True)
class GenerateText:
    """Windows that the model itself samples after `prefix`. The value is int64 [count, length].

    Attributes:
        first: index of the first window, which selects its random numbers together with `seed`.
        prefix: token ids that every window starts with, int64 [any]; empty: a random token.
    """

    key: ModelKey
    count: int
    length: int
    first: int
    seed: int
    prefix: np.ndarray

    def run(self, context: JobContext) -> JobOutput[np.ndarray]:
        calibrator = context.model(Calibrator, self.key)
        return JobOutput(calibrator.generate(self.count, self.length, self.first, self.seed, self.prefix))
