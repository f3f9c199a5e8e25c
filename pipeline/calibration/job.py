"""Jobs of calibration: gather sums over some windows, add them up, complete their records, generate text."""

from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline.calibration.gather import Calibrator, sums_payload
from pipeline.calibration.hessian_store import HessianRow
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload, file_sha256, to_stored_tensor, to_tensor
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.loading import ModelKey
from swsc_core.compressed.config_json import part_name


@dataclass(frozen=True)
class GatherHessians:
    """Gather the sums of some matrices over some windows. The job returns one payload per part.

    A payload holds the float32 sums X.weighted, X.plain and X.rows of each matrix X; `AddHessians` adds the sums of
    other windows. The value holds digests of the bytes that the model was loaded from.

    Attributes:
        parts: names of the matrices of each part.
        windows: int64 [windows, seqlen].
        first: index of the first window in the text.
    """

    key: ModelKey
    parts: tuple[tuple[str, ...], ...]
    windows: np.ndarray
    first: int
    seed: int

    def run(self, context: JobContext) -> JobOutput[RangeDigests]:
        calibrator = context.model(Calibrator, self.key)
        names = [name for part in self.parts for name in part]
        sums = calibrator.gather(names, self.windows, self.first, self.seed)
        payloads = tuple(sums_payload({name: sums[name] for name in part}) for part in self.parts)
        return JobOutput(calibrator.source_digests, payloads)


@dataclass(frozen=True)
class AddHessians:
    """Add two payloads of sums of the same part. Inputs: the sum of the earlier shards, and the next shard."""

    def run(self, context: JobContext) -> JobOutput[None]:
        total, shard = context.inputs
        part_pairs = zip(total.parts, shard.parts, strict=True)
        parts = tuple(to_stored_tensor(a.name, to_tensor(a) + to_tensor(b)) for a, b in part_pairs)
        row_pairs = zip(map(HessianRow.from_json, total.rows), map(HessianRow.from_json, shard.rows), strict=True)
        rows = tuple(asdict(replace(a, tokens=a.tokens + b.tokens)) for a, b in row_pairs)
        return JobOutput(None, (Payload(parts, rows),))


@dataclass(frozen=True)
class KeepHessians:
    """Complete the records of a part. The payload is the file of the part, the value its records. Input: its sums."""

    def run(self, context: JobContext) -> JobOutput[tuple[HessianRow, ...]]:
        (part,) = context.inputs
        rows = tuple(_with_digest(HessianRow.from_json(row), part) for row in part.rows)
        return JobOutput(rows, (Payload(part.parts, tuple(map(asdict, rows))),))


def _with_digest(row: HessianRow, part: Payload) -> HessianRow:
    names = {part_name(row.name, sums) for sums in ("weighted", "rows", "plain")}
    return replace(row, sha256=file_sha256(tensor for tensor in part.parts if tensor.name in names))


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
