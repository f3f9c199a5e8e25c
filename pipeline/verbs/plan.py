"""The verb plan: a model and settings in, the action on every tensor and the estimated cost out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.sources.gguf_headers import open_headers
from pipeline.errors import OutputError
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine
from pipeline.planning.cost_model import cached_bytes, estimate_cost
from pipeline.planning.machine_speed import Speed, measure_speed
from pipeline.planning.memory import layer_compression_memory, stage_memory
from pipeline.planning.plan import Decision, Plan, make_plan, require_coverage
from pipeline.planning.spec_resolution import budget_bytes
from pipeline.planning.stage_seconds import stage_seconds
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.storage.store import Store
from pipeline.verbs.json_file import JsonFile
from pipeline.verbs.plan_stages import StagePlan, StagePlanner, hardware_of


@dataclass(frozen=True)
class PlanRequest:
    """A plan of a compression.

    Attributes:
        output: directory whose disk must have room for the output; None: not checked.
        json: file that receives the plan.
        config: file that the settings were read from, which `json` must not replace.
    """

    model: str
    settings: CompressSettings = field(default_factory=CompressSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    writing: OutputSettings = field(default_factory=OutputSettings)
    output: str | None = None
    json: str | None = None
    config: str | None = None

    @property
    def allocates(self) -> bool:
        """Whether a calibration chooses the bits of each matrix, so that the plan has their limits only."""
        return self.settings.preset_definition.allocates

    def json_file(self) -> JsonFile | None:
        """The file of the plan; OutputError if it cannot be written."""
        inputs = [("MODEL", self.model), ("--calibration", self.calibration.calibration), ("--config", self.config)]
        return JsonFile.at(self.json, inputs) if self.json else None


@dataclass(frozen=True)
class PlanResult:
    """A plan and its estimated cost.

    Attributes:
        left_out: file beside the weights -> reason for which it is not read.
        estimates: bytes, bits, seconds and workers, by name, as the JSON file has them.
        free_bytes: room on the disk of the output; None if it is not known or was not requested.
        stages: how each stage runs, on the cluster or on the hardware that the settings describe.
    """

    request: PlanRequest
    plan: Plan
    left_out: Mapping[str, str]
    estimates: Mapping[str, float]
    free_bytes: int | None
    stages: Sequence[StagePlan] = ()

    def to_json(self) -> dict[str, object]:
        """The plan as the JSON file has it."""
        tensors = [_row(decision) for decision in self.plan.decisions]
        stages = [stage.to_json() for stage in self.stages]
        return {"tensors": tensors, "left_out": dict(self.left_out), "stages": stages, **self.estimates}

    def require_acceptable(self) -> None:
        """Raise ConfigError if too few weights are compressed, OutputError if the disk has not enough room."""
        require_coverage(self.plan, self.request.writing.require_coverage)
        if self.free_bytes is not None and self.free_bytes < self.estimates["disk_bytes"]:
            raise OutputError(
                f"{self.request.output}: the disk has not enough room; free some, or choose another directory"
            )


def plan(request: PlanRequest) -> PlanResult:
    """Plan a compression, and write the plan if the request names a file.

    Raises:
        ConfigError: settings that do not fit the model. CheckpointError: the model cannot be opened.
        OutputError: the JSON file cannot be written.
    """
    json_file = request.json_file()
    source = open_headers(request.model)
    decided = make_plan(source, request.settings, dense=request.settings.format == "dense")
    model = Model(source, {})
    examine(model, request.calibration.trust_remote_code)
    free = Store.at(request.output).free_bytes() if request.output else None
    estimates, stages = _planned(request, model, decided)
    estimates |= {} if free is None else {"free_bytes": free}
    result = PlanResult(request, decided, dict(source.ignored_files), estimates, free, stages)
    if json_file:
        json_file.write(result.to_json())
    return result


def comparable_paper_bits(decided: Plan) -> dict[str, float]:
    """Matrix -> its bits per weight by the paper's count, which does not cover vector quantization of segments."""
    return {
        decision.info.name: decision.paper_bits
        for decision in decided.compressed
        if decision.paper_bits is not None and not any(spec.cuts_channels for spec in decision.specs)
    }


def _planned(request: PlanRequest, model: Model, decided: Plan) -> tuple[dict[str, float], list[StagePlan]]:
    """The estimates by name, and how each stage runs."""
    speed = measure_speed(model.checkpoint)
    with hardware_of(request.cluster) as hardware:
        tasks = len(decided.layers) + len(decided.copies)
        workers = hardware.count(tasks, layer_compression_memory(decided))
        estimates = _estimates(request, model, decided, speed, workers)
        planner = StagePlanner(model, decided, request.settings, request.calibration, hardware, speed)
        others = sum(value for name, value in estimates.items() if name.endswith("_core_seconds"))
        return estimates, planner.stages(estimates["seconds"] - others / workers)


def _estimates(request: PlanRequest, model: Model, decided: Plan, speed: Speed, workers: int) -> dict[str, float]:
    settings = request.settings
    source = model.checkpoint
    estimates: dict[str, float] = estimate_cost(decided, settings.format, speed, workers)
    others = stage_seconds(source, decided, settings, request.calibration, speed)
    estimates["core_seconds"] += sum(others.values())
    estimates["seconds"] += sum(others.values()) / workers
    estimates |= {f"{stage}_core_seconds": seconds for stage, seconds in others.items()}
    estimates |= _allocated_bits(source, decided, settings) if request.allocates else {}
    memories = stage_memory(model, decided, settings, request.calibration)
    estimates |= {f"{stage}_peak_bytes": each.cpu for stage, each in memories.items() if stage != "compress"}
    return estimates | {"disk_bytes": estimates["output_bytes"] + cached_bytes(decided, settings)}


def _allocated_bits(source: Checkpoint, decided: Plan, settings: CompressSettings) -> dict[str, float]:
    """The largest bits that an allocation may result in; the specs of the plan, which it replaces, may have less."""
    matrices = [decision.matrix for decision in decided.compressed]
    budget = budget_bytes(source, matrices, settings)
    others = decided.stored_bytes - sum(decision.stored_bytes for decision in decided.compressed)
    bits = {
        "compressed_bits_per_weight": 8 * budget / sum(info.count for info in matrices),
        "whole_model_bits_per_weight": 8 * (others + budget) / decided.weights,
    }
    return bits | ({"output_bytes": others + budget} if settings.format == "swsc" else {})


def _row(decision: Decision) -> dict[str, object]:
    return {
        "name": decision.info.name,
        "action": decision.action,
        "reason": decision.reason,
        "shape": list(decision.info.shape),
        **decision.location.to_json(),
        "method": decision.specs[0].method if decision.specs else None,
        "bits_per_weight": 8 * decision.stored_bytes / decision.info.count if decision.specs else None,
        "paper_bits": decision.paper_bits,
    }
