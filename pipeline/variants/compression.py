"""The values that describe one compression: model, plan, calibration, output directory and workers."""

import os
from dataclasses import dataclass, field

import numpy as np

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools
from pipeline.outputs.preflight import identity_of
from pipeline.outputs.report_rows import CompressedRow
from pipeline.planning.plan import Plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import CALIBRATION_KEY
from pipeline.tuning.steps import TuningReport
from pipeline.tuning.tuner import TunedValues


@dataclass(frozen=True)
class Compute:
    """Where the jobs of a command run, and the arithmetic that all its workers share."""

    pools: Pools
    arithmetic: Arithmetic


@dataclass(frozen=True)
class Target:
    """The directory that a compression writes.

    Attributes:
        overwrite: replace an output of other settings, or a damaged one.
        waits: wait for another run that writes there, instead of refusing to start.
    """

    location: str
    overwrite: bool = False
    waits: bool = False


@dataclass(frozen=True)
class CalibrationRecord:
    """Content of swsc_calibration.json, which lets an evaluation refuse text that the model was calibrated on.

    Attributes:
        text: location of the calibration text; None if the model generated it.
        traces: hashes of passages of all texts that the model was calibrated on, sorted.
    """

    text: str | None
    traces: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationResult:
    """What the calibration of a model gives to its compression.

    Attributes:
        hessians: Hessians, which workers read; None if the specs weight all errors equally.
        fingerprint: digest of the specs, the text and the Hessians.
        record: what the output states about the text.
        ids: int64 [windows, length], the tokens.
        cache: directory, visible to all nodes, of intermediate results.
    """

    hessians: Hessians | None
    fingerprint: str
    record: CalibrationRecord
    ids: np.ndarray
    cache: str

    @property
    def description(self) -> str:
        """The text in words, for the model card; a file is named without its directory."""
        text = os.path.basename(self.record.text) if self.record.text else "text that the model generated"
        return f"{len(self.ids)} windows of {self.ids.shape[1]} tokens of {text}"


@dataclass(frozen=True)
class Compression:
    """One model that is compressed in one way.

    Attributes:
        calibration: how the model is calibrated, if its settings need that.
        calibrated: result of the calibration; None before it, and for settings that need none.
    """

    source: Checkpoint
    plan: Plan
    settings: CompressSettings
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    calibrated: CalibrationResult | None = None

    @property
    def hessians(self) -> Hessians | None:
        """The Hessians, if specs use them."""
        return self.calibrated.hessians if self.calibrated else None

    def identity(self, arithmetic: Arithmetic) -> dict[str, object]:
        """What the bytes of the output depend on; two compressions of equal identity give equal outputs."""
        fingerprint = self.calibrated.fingerprint if self.calibrated else None
        return {**identity_of(self.source, self.settings, arithmetic), CALIBRATION_KEY: fingerprint}


@dataclass(frozen=True)
class TunedModel:
    """A compressed model after tuning, whose values replace those of the compression.

    Attributes:
        tuned: the stored values, which workers read.
        rows: matrix -> its report row before tuning.
        summary: what the report states about the tuning.
    """

    tuned: TunedValues
    rows: dict[str, CompressedRow]
    summary: TuningReport
