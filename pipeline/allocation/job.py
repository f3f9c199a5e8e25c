"""Jobs of allocation: how much a matrix matters, and how much of that each candidate spec loses."""

from dataclasses import dataclass

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.matrix_reader import read_source_matrix
from pipeline.storage.store import Store
from swsc_core.allocation.sensitivity import relative_distortion, sensitivity
from swsc_core.method.spec import SwscSpec


@dataclass(frozen=True)
class MeasureSensitivity:
    """Predicted loss, in nats a token, if each weight of a matrix kept nothing but its row's scale."""

    source: Store
    info: MatrixInfo
    hessians: Hessians

    def run(self, context: JobContext) -> JobOutput[float]:
        metric, unit = self.hessians.metric(self.info.name, context.device)
        return JobOutput(unit * sensitivity(read_source_matrix(self.source, self.info, context.device).weight, metric))


@dataclass(frozen=True)
class SpecDistortion:
    """The share of a matrix's sensitivity that remains as loss under a spec, measured on some of its rows."""

    spec: SwscSpec
    share: float


@dataclass(frozen=True)
class MeasureDistortions:
    """Relative distortion of a matrix under each of some specs."""

    source: Store
    info: MatrixInfo
    hessians: Hessians
    specs: tuple[SwscSpec, ...]
    seed: int

    def run(self, context: JobContext) -> JobOutput[tuple[SpecDistortion, ...]]:
        weight = read_source_matrix(self.source, self.info, context.device).weight
        metric, _ = self.hessians.metric(self.info.name, context.device)
        shares = (relative_distortion(weight, spec, metric, self.seed, self.info.name) for spec in self.specs)
        return JobOutput(tuple(map(SpecDistortion, self.specs, shares)))
