"""`swsc compress MODEL OUTPUT`: compress, and measure too if a text is given."""

import argparse
from typing import Any

from jobs.command_line.flags import settings_of
from jobs.evaluate import summarise as summarise_evaluation
from jobs.evaluate import within_positions
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.sources.hub import require_pushable
from pipeline.device import Arithmetic
from pipeline.errors import ConfigError
from pipeline.evaluation.flow import evaluate_model, evaluator_bytes
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine, require_cache, require_output, require_unmixed
from pipeline.outputs.report import compressed_rows
from pipeline.planning.cost_model import stage_bytes
from pipeline.planning.plan import make_plan, require_coverage
from pipeline.report.tables import print_table
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.loading import SourceSettings
from pipeline.settings.push import PushSettings
from pipeline.settings.validation import validated
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.storage.store import Store
from pipeline.texts.texts import has_columns
from pipeline.texts.windows import make_windows, require_within
from pipeline.variants.calibrate_and_allocate import cache_of, prepare
from pipeline.variants.compress_and_tune import produce
from pipeline.verification.push import push_output


def run(arguments: argparse.Namespace) -> int:
    settings, calibration, cluster, output, trust = settings_of(
        arguments, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings, SourceSettings
    )
    _require_flags(arguments)
    evaluation = _evaluation_of(arguments, calibration.trust_remote_code) if arguments.text else None
    _require_places(arguments, settings, calibration, trust)
    source = open_checkpoint(arguments.model)
    require_unmixed(source, Store.at(arguments.output))
    plan = make_plan(source, settings, dense=settings.format == "dense")
    examine(Model(source, {}), calibration.trust_remote_code, measured=settings.needs_calibration or bool(evaluation))
    require_coverage(plan, output.require_coverage)
    bare, cache = Arithmetic(cluster.threads_per_worker, None), cache_of(calibration, arguments.output)
    require_output(source, plan, arguments.output, settings, bare, cache, output.overwrite)
    if evaluation:
        require_causal(Model(source, {}), calibration.trust_remote_code)
        evaluation = within_positions(evaluation, source.config)
        # before hours of work
        require_within(make_windows(arguments.model, evaluation).ids, source)
    # late: importing Ray takes a second, and a mistake should show before
    from pipeline.engine.ray_backend.arithmetic import arithmetic_of
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    later = max(stage_bytes(source, plan, settings, calibration).values())
    measuring = evaluator_bytes(Model(source, {}), evaluation) if evaluation else 0
    arithmetic = arithmetic_of(cluster)  # before workers take all GPUs: it may have to ask one
    with worker_pools(cluster, later, measuring) as pools:
        if trust.verify_source:
            from pipeline.verification.source import verified

            source = verified(source, trust.verify_source, pools)
            plan = make_plan(source, settings, dense=settings.format == "dense")
        unseen = [evaluation] if evaluation else []
        plan, calibrated = prepare(source, plan, settings, calibration, arguments.output, pools, arithmetic, unseen)
        report = produce(
            source, plan, arguments.output, settings, calibration, calibrated, arithmetic, pools, output.overwrite
        )
        summarise(arguments.output, report)
        if evaluation:
            summarise_evaluation(evaluate_model(arguments.output, evaluation, pools))
        if arguments.push:
            push = PushSettings(private=arguments.private)
            print(f"{arguments.output}: pushed, {push_output(arguments.output, arguments.push, push, pools)}")
    return 0


def _require_flags(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for flags that would be ignored, or a repository that nothing can be pushed to."""
    cut = sorted({"seqlen", "windows"} & vars(arguments).keys())
    if cut and not arguments.text:
        raise ConfigError(f"{', '.join(cut)} mean nothing without --text: add it, or drop them")
    if arguments.private and not arguments.push:
        raise ConfigError("private means nothing without --push: add it, or drop it")
    if arguments.push:
        require_pushable(arguments.push)


def _require_places(
    arguments: argparse.Namespace, settings: CompressSettings, calibration: CalibrationSettings, trust: SourceSettings
) -> None:  # fmt: skip
    """Raise OutputError if what is written would change what is read, before anything is opened."""
    read = user_paths(
        [
            ("MODEL", arguments.model),
            ("--text", arguments.text),
            ("--calibration", calibration.calibration),
            ("--config", arguments.config),
            ("--verify-source", trust.verify_source),
        ]
    )
    output = UserPath.at("OUTPUT", arguments.output)
    require_disjoint_paths(output, read)
    if settings.needs_calibration or calibration.cache_dir:
        require_cache(cache_of(calibration, arguments.output), [output, *read])


def _evaluation_of(arguments: argparse.Namespace, trusted: bool) -> EvaluateSettings:
    kept = {key: value for key, value in vars(arguments).items() if key in {"text", "seqlen", "windows"}}
    if "text_column" in arguments and has_columns(arguments.text):  # the calibration text may be the one that has some
        kept["text_column"] = arguments.text_column
    return validated(EvaluateSettings, kept | {"trust_remote_code": trusted})


def summarise(output: str, report: dict[str, Any]) -> None:
    """A table of the compressed matrices, and one line on the whole."""
    print_table(compressed_rows(report), ["name", "shape", "paper_bits", "bits_per_weight", "relative_error"])
    print(
        f"{output}: {report['compressed_bits_per_weight']:.3f} bits a weight over the compressed matrices"
        f" ({report['share_of_weights_compressed']:.1%} of all weights),"
        f" {report['whole_model_bits_per_weight']:.3f} over the whole model, {report['seconds']:.1f} s"
        + _resumed(report)
    )
    if tuning := report.get("tuning"):
        print(
            f"tuning: {tuning['divergence_before']:.4f} to {tuning['divergence_after']:.4f} nats a token on held-out windows"
            + ("" if tuning["applied"] else ": no better, so it was not applied")
        )


def _resumed(report: dict[str, Any]) -> str:
    if report.get("resumed"):
        return " (it was complete already)"
    kept = report["files_of_an_earlier_run"]
    return f" for what an earlier run had left ({kept} files were finished)" if kept else ""
