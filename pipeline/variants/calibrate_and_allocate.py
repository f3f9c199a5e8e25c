"""The stages before a compression that need text: calibration, and allocation of the bit budget from its Hessians."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.allocation.flow import allocate_plan
from pipeline.calibration.flow import Calibration, CalibrationInputs
from pipeline.calibration.hessian_store import Hessians
from pipeline.calibration.self_generated_text import self_generated_windows
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.console import log
from pipeline.errors import ConfigError
from pipeline.outputs.preflight import VERIFIED_SOURCE_PREFIX
from pipeline.outputs.transaction import calibration_hashes
from pipeline.redaction import redacted
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.loading import LoadSettings
from pipeline.storage.cache_key import digest_of, spec_identity, windows_identity
from pipeline.storage.store import Store
from pipeline.texts.contamination import require_uncontaminated
from pipeline.texts.texts import read_text
from pipeline.texts.windows import CalibrationText, calibration_windows, require_within
from pipeline.tuning.windows import TuningWindows
from pipeline.variants.compression import CalibrationRecord, CalibrationResult, Compression, Compute


def calibrate_and_allocate(
    compression: Compression, cache: str, compute: Compute, evaluation_texts: Sequence[EvaluateSettings] = ()
) -> Compression:
    """`compression` with its calibration and its final specs. Results of earlier runs in the cache are reused.

    Settings that need no calibration return the compression as it is.

    Args:
        cache: directory, visible to all nodes, of intermediate results; see `cache_location`.
        evaluation_texts: texts that the result will be evaluated on, which must not share passages with the
            calibration.

    Raises:
        ConfigError: settings of a calibration that the compression does not need, or a budget that cannot be met.
        TextError: a text that is missing or too short, or that shares passages with an evaluation text.
    """
    settings = compression.settings
    if not settings.needs_calibration:
        _require_no_calibration(compression.calibration, bool(evaluation_texts))
        return compression
    cache = _cache_of_source(cache, compression.source)
    text = _calibration_text(compression, cache, compute)
    record = _record(compression, text)
    for evaluation in evaluation_texts:
        content = read_text(evaluation.text, evaluation.text_column)
        require_uncontaminated(frozenset(record.traces), content, evaluation.text)
    if settings.epochs:
        TuningWindows(
            text.ids, settings.epochs, settings.seed
        )  # raises before hours of work if there are too few windows
    hessians = _hessians(compression, text.ids, cache, compute) if settings.needs_hessians else None
    plan = compression.plan
    if hessians and settings.preset_definition.allocates:
        plan = allocate_plan(compression.source, plan, settings, hessians, compute.pools)
    compression = replace(compression, plan=plan)
    fingerprint = _fingerprint(compression, text.ids, hessians)
    return replace(compression, calibrated=CalibrationResult(hessians, fingerprint, record, text.ids, cache))


def cache_location(calibration: CalibrationSettings, output: str) -> str:
    """Directory of intermediate results: the one of the settings, else `.swsc-cache` beside the output."""
    return calibration.cache_dir or Store.at(output).parent.below(".swsc-cache").root


def _require_no_calibration(calibration: CalibrationSettings, evaluated: bool) -> None:
    """Raise ConfigError for calibration settings that were given although nothing is calibrated."""
    unused = CalibrationSettings.model_fields.keys() - LoadSettings.model_fields.keys()
    if evaluated:
        unused -= {"text_column"}  # that of the evaluation text
    if given := sorted(calibration.model_fields_set & unused):
        raise ConfigError(
            f"{', '.join(given)}: only apply when calibration is needed; use --preset best|fast, or remove them"
        )


def _cache_of_source(cache: str, source: Checkpoint) -> str:
    """The folder of a verified source inside the cache, which holds no results of unverified bytes."""
    digests = digests_of_source(source)
    return Store.at(cache).below(f"{VERIFIED_SOURCE_PREFIX}{digests.name}").root if digests else cache


def _calibration_text(compression: Compression, cache: str, compute: Compute) -> CalibrationText:
    """Windows of the calibration text, or of text that the model generates (preset data-free)."""
    source, settings, calibration = compression.source, compression.settings, compression.calibration
    if not settings.preset_definition.generates_text:
        text = calibration_windows(source.store.root, calibration)
        if text.origin:
            log(f"note: calibration {calibration.calibration}: {text.origin}")
        require_within(text.ids, source)
        return text
    if calibration.calibration:
        raise ConfigError(f"calibration: preset {settings.preset} generates its text; remove it, or use --preset best")
    require_within(np.zeros((1, calibration.calibration_seqlen), dtype=np.int64), source)
    ids = self_generated_windows(source, calibration, cache, settings.seed, compute.pools, compute.arithmetic)
    require_within(ids, source)
    return CalibrationText(ids, frozenset())


def _hessians(compression: Compression, ids: np.ndarray, cache: str, compute: Compute) -> Hessians:
    matrices = [decision.matrix for decision in compression.plan.compressed]
    inputs = CalibrationInputs(compression.source, matrices, ids, compression.settings.seed, compute.arithmetic)
    return Calibration(inputs, compression.calibration, cache).run(compute.pools)


def _fingerprint(compression: Compression, ids: np.ndarray, hessians: Hessians | None) -> str:
    specs = {
        decision.info.name: [spec_identity(spec) for spec in decision.specs] for decision in compression.plan.compressed
    }
    inputs: dict[str, object] = {"dtype": compression.calibration.calibration_dtype}
    if hessians:  # the name of their directory covers the arithmetic, which tuning covers without Hessians
        inputs = {"moments": hessians.store.name, "gradient_share": hessians.gradient_share}
    return digest_of({"specs": specs, **inputs, **windows_identity(ids)})


def _record(compression: Compression, text: CalibrationText) -> CalibrationRecord:
    """The calibration text's name, and hashes of its passages and of those that the source was calibrated on before."""
    location = compression.calibration.calibration
    traces = text.hashes | calibration_hashes(compression.source.store)
    return CalibrationRecord(location and redacted(location), tuple(sorted(traces)))
