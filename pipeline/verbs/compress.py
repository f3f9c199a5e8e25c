"""The verb compress: a checkpoint in, a compressed model out, optionally evaluated and pushed to the Hub."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.sources.hub import require_pushable
from pipeline.device import Arithmetic
from pipeline.engine.stage import Stage
from pipeline.evaluation.flow import EvaluationResult, evaluate_model, evaluator_memory
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine, identity_of, names_of, require_cache, require_output, require_unmixed
from pipeline.outputs.report_rows import compressed_rows
from pipeline.outputs.transaction import OutputRequest
from pipeline.planning.memory import stage_memory
from pipeline.planning.plan import Plan, make_plan, require_coverage
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.loading import SourceSettings
from pipeline.settings.push import PushSettings
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.storage.store import Store
from pipeline.texts.windows import make_windows, require_within
from pipeline.variants.calibrate_and_allocate import cache_location, calibrate_and_allocate
from pipeline.variants.compress_and_tune import compress_and_tune
from pipeline.variants.compression import Compression, Compute, Target
from pipeline.verbs.evaluate import within_positions
from pipeline.verbs.plan import comparable_paper_bits
from pipeline.verbs.push import push_output
from pipeline.verification.source import verified


@dataclass(frozen=True)
class CompressRequest:
    """A compression of one model.

    Attributes:
        model: location of the checkpoint.
        output: directory to write.
        writing: how the output directory is treated.
        loading: how the source is verified.
        evaluation: evaluate the output on this text; None: no evaluation.
        push: repository on the Hub that receives the output; None: no upload.
        config: file that the settings were read from, which the output must not replace.
    """

    model: str
    output: str
    settings: CompressSettings = field(default_factory=CompressSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    writing: OutputSettings = field(default_factory=OutputSettings)
    loading: SourceSettings = field(default_factory=SourceSettings)
    evaluation: EvaluateSettings | None = None
    push: str | None = None
    push_settings: PushSettings = field(default_factory=PushSettings)
    config: str | None = None

    @property
    def cache(self) -> str:
        """Directory of intermediate results."""
        return cache_location(self.calibration, self.output)

    def require_valid(self) -> None:
        """Check what needs neither the model nor a worker.

        Raises:
            ConfigError: `push` is no repository, or nobody is logged in to the Hub.
            OutputError: the output or the cache would change something that is read.
        """
        if self.push:
            require_pushable(self.push)
        inputs = user_paths(
            [
                ("MODEL", self.model),
                ("--text", self.evaluation.text if self.evaluation else None),
                ("--calibration", self.calibration.calibration),
                ("--config", self.config),
                ("--verify-source", self.loading.verify_source),
            ]
        )
        output = UserPath.at("OUTPUT", self.output)
        require_disjoint_paths(output, inputs)
        if self.settings.needs_calibration or self.calibration.cache_dir:
            require_cache(self.cache, [output, *inputs])


@dataclass(frozen=True)
class CompressResult:
    """A compressed model.

    Attributes:
        report: content of swsc_report.json.
        seconds: of the command until the output was complete, calibration and tuning included.
        matrices: the report's rows of compressed matrices, for a table: without bits by the paper's count for a matrix
            whose form the paper does not have.
        evaluation: perplexity, as `swsc evaluate --json` writes it; None if none was requested.
        note: what the user should know about the length of the evaluation's windows; may be empty.
        commit: address of the commit on the Hub; None if no upload was requested.
    """

    request: CompressRequest
    report: Mapping[str, object]
    matrices: Sequence[Mapping[str, object]]
    seconds: float = 0.0
    evaluation: EvaluationResult | None = None
    note: str = ""
    commit: str | None = None


def compress(
    request: CompressRequest, on_stage: Callable[[CompressResult], None] = lambda result: None
) -> CompressResult:
    """Compress a model; every check that needs no worker comes before the first task.

    Args:
        on_stage: receives the result so far after each stage: compression, evaluation, upload. A later stage may fail.

    Raises:
        ConfigError, CheckpointError, TextError, OutputError: a mistake in the request or in a file that it names.
        RunError: tasks failed; finished files are kept, and the same request resumes.
    """
    started = time.perf_counter()
    request.require_valid()
    checked = _checked(request)
    compression, evaluation = checked.compression, checked.evaluation
    # Late, because importing Ray takes a second, and mistakes should show before.
    from pipeline.engine.ray_backend.arithmetic import arithmetic_of
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    source, settings, calibration = compression.source, compression.settings, compression.calibration
    model = Model(source, {})
    memories = stage_memory(model, compression.plan, settings, calibration)
    stages = [Stage("compress", memories.pop("compress"))]
    # Calibration, tuning and evaluation may run in blocks of layers.
    optional = [Stage(name, memory) for name, memory in memories.items()]
    optional += [Stage("evaluate", evaluator_memory(model, evaluation))] if evaluation else []
    arithmetic = arithmetic_of(request.cluster)  # before the workers take all GPUs: it may have to ask one
    with worker_pools(request.cluster, stages, optional) as pools:
        result = _compressed(request, compression, Compute(pools, arithmetic), evaluation)
        result = replace(result, seconds=time.perf_counter() - started)
        on_stage(result)
        if evaluation:
            perplexity = evaluate_model(request.output, evaluation, pools)
            result = replace(result, evaluation=perplexity, note=checked.note)
            on_stage(result)
        if request.push:
            commit = push_output(request.output, request.push, request.push_settings, pools)
            result = replace(result, commit=commit)
            on_stage(result)
    return result


@dataclass(frozen=True)
class _Checked:
    """A compression and an evaluation that passed all checks which need no worker.

    Attributes:
        note: what the user should know about the length of the windows; may be empty.
    """

    compression: Compression
    evaluation: EvaluateSettings | None
    note: str


def _checked(request: CompressRequest) -> _Checked:
    """Open the model and check what needs only headers and texts."""
    note = ""
    settings, calibration, evaluation = request.settings, request.calibration, request.evaluation
    source = open_checkpoint(request.model)
    require_unmixed(source, Store.at(request.output))
    plan = _plan(source, settings)
    model, trusted = Model(source, {}), calibration.trust_remote_code
    examine(model, trusted, measured=settings.needs_calibration or bool(evaluation))
    require_coverage(plan, request.writing.require_coverage)
    arithmetic = Arithmetic(request.cluster.threads_per_worker, None)  # the device of the workers is not known yet
    identity = identity_of(source, settings, arithmetic)
    output = OutputRequest(Store.at(request.output), identity, names_of(source, plan), request.writing.overwrite)
    require_output(output, source, plan, settings, request.cache)
    if evaluation:
        require_causal(model, trusted)
        evaluation, note = within_positions(evaluation, source.config)
        require_within(make_windows(request.model, evaluation).ids, source)
    return _Checked(Compression(source, plan, settings, calibration), evaluation, note)


def _compressed(
    request: CompressRequest, compression: Compression, compute: Compute, evaluation: EvaluateSettings | None
) -> CompressResult:
    """Verify the source, calibrate, compress and tune, as far as the request asks for it."""
    if request.loading.verify_source:
        source = verified(compression.source, request.loading.verify_source, compute.pools)
        compression = replace(compression, source=source, plan=_plan(source, compression.settings))
    texts = [evaluation] if evaluation else []
    compression = calibrate_and_allocate(compression, request.cache, compute, texts)
    report = compress_and_tune(compression, Target(request.output, request.writing.overwrite), compute)
    paper_bits = comparable_paper_bits(compression.plan)
    rows = [{**row, "paper_bits": paper_bits.get(row["name"])} for row in compressed_rows(report)]
    return CompressResult(request, report, rows)


def _plan(source: Checkpoint, settings: CompressSettings) -> Plan:
    return make_plan(source, settings, dense=settings.format == "dense")
