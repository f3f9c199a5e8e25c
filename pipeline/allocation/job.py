"""Jobs of allocation: the sensitivity of a matrix, and the relative distortion of candidate specs."""

from dataclasses import dataclass

from pipeline.allocation.curves import SpecDistortion
from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.matrix_reader import read_source_matrix
from pipeline.storage.store import Store
from swsc_core.allocation.sensitivity import relative_distortion, sensitivity
from swsc_core.method.spec import SwscSpec


@dataclass(frozen=True)
class MeasureSensitivity:
    """Estimated loss, in nats per token, if each weight of a matrix kept nothing but the scale of its row."""

    source: Store
    info: MatrixInfo
    hessians: Hessians

    def run(self, context: JobContext) -> JobOutput[float]:
        metric, unit = self.hessians.metric(self.info.name, context.device)
        weight = read_source_matrix(self.source, self.info, context.device).weight
        return JobOutput(unit * sensitivity(weight, metric))


@dataclass(frozen=True)
class MeasureDistortions:
    """Relative distortion of a matrix under each of `specs`, measured on some of its rows."""

    source: Store
    info: MatrixInfo
    hessians: Hessians
    specs: tuple[SwscSpec, ...]
    seed: int

    def run(self, context: JobContext) -> JobOutput[tuple[SpecDistortion, ...]]:
        weight = read_source_matrix(self.source, self.info, context.device).weight
        metric, _ = self.hessians.metric(self.info.name, context.device)
        distortions = (relative_distortion(weight, spec, metric, self.seed, self.info.name) for spec in self.specs)
        return JobOutput(tuple(map(SpecDistortion, self.specs, distortions)))
