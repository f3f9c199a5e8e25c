"""What comes before a compression that needs a text: second moments, the specs that follow from them, windows to tune on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.allocation.flow import allocate_plan
from pipeline.calibration.flow import Calibration
from pipeline.calibration.hessian_store import Hessians
from pipeline.calibration.self_generated_text import self_generated_windows
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.console import log
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools
from pipeline.errors import ConfigError
from pipeline.outputs.preflight import OF_SOURCE
from pipeline.outputs.transaction import known_traces
from pipeline.planning.plan import Plan
from pipeline.redaction import redacted
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.loading import LoadSettings
from pipeline.settings.matrix import MatrixSettings
from pipeline.storage.cache_key import digest_of, spec_identity, windows_identity
from pipeline.storage.store import Store
from pipeline.texts.contamination import require_apart
from pipeline.texts.texts import read_text
from pipeline.texts.windows import CalibrationText, calibration_windows, require_within
from pipeline.tuning.flow import TuningWindows
from pipeline.variants.compress import Calibrated


def prepare(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, calibration: CalibrationSettings, beside: str,
    pools: Pools, arithmetic: Arithmetic, unseen: Sequence[EvaluateSettings] = (),
) -> tuple[Plan, Calibrated | None]:  # fmt: skip
    """The plan with its final specs, and the calibration that it rests on; both are found again if they were made before.

    Args:
        beside: the output, beside which moments are kept unless a cache directory is given.
        unseen: texts that the result will be measured on.

    Raises:
        ConfigError: a calibration that nothing needs, or a budget that cannot be met.
        TextError: a text that is missing or too short, or that shares passages with `unseen`.
    """
    if not settings.needs_calibration:
        own = CalibrationSettings.model_fields.keys() - LoadSettings.model_fields.keys()
        if idle := sorted(calibration.model_fields_set & (own - ({"text_column"} if unseen else set()))):
            raise ConfigError(
                f"{', '.join(idle)} mean nothing to metric weights without tune: choose preset best or fast, or drop them"
            )
        return plan, None
    cache = cache_of_source(cache_of(calibration, beside), source)
    if settings.preset_definition.generates_text:
        if calibration.calibration:
            raise ConfigError(f"calibration means nothing to preset {settings.preset}: drop it, or choose preset best")
        require_within(np.zeros((1, calibration.calibration_seqlen), dtype=np.int64), source)
        text = CalibrationText(
            self_generated_windows(source, calibration, cache, settings.seed, pools, arithmetic), frozenset()
        )
    else:
        text = calibration_windows(source.store.root, calibration)
        if text.origin:
            log(f"note: calibration {calibration.calibration}: {text.origin}")
    require_within(text.ids, source)
    about = _about(source, calibration, text)
    for measured in unseen:
        require_apart(frozenset(about["traces"]), read_text(measured.text, measured.text_column), measured.text)
    if settings.epochs:
        TuningWindows(text.ids, settings.epochs, settings.seed)  # too few windows are told of before hours of work
    hessians = None
    if settings.needs_hessians:
        infos = [decision.matrix for decision in plan.compressed]
        hessians = Calibration(source, infos, text.ids, calibration, cache, settings.seed, arithmetic).run(pools)
        if settings.preset_definition.allocates:
            plan = allocate_plan(source, plan, settings, hessians, pools)
    return plan, Calibrated(hessians, _fingerprint(plan, text, hessians, calibration), about, text.ids, cache)


def cache_of(calibration: CalibrationSettings, beside: str) -> str:
    """Where moments and models that are yet to be tuned are kept."""
    return calibration.cache_dir or Store.at(beside).parent.below(".swsc-cache").root


def cache_of_source(cache: str, source: Checkpoint) -> str:
    """The part of a cache that is of a verified source: what was made of bytes that nobody knew is not in it."""
    known = digests_of_source(source)
    return Store.at(cache).below(f"{OF_SOURCE}{known.name}").root if known else cache


def _fingerprint(plan: Plan, text: CalibrationText, hessians: Hessians | None, calibration: CalibrationSettings) -> str:
    specs = {one.info.name: [spec_identity(spec) for spec in one.specs] for one in plan.compressed}
    # The name of moments stands for their arithmetic, too; without moments it is that of the tuning.
    gathered = {"moments": hessians.store.name, "gradient_share": hessians.gradient_share} if hessians else {}
    about = gathered or {"dtype": calibration.calibration_dtype}
    return digest_of({"specs": specs, **about, **windows_identity(text.ids)})


def _about(source: Checkpoint, calibration: CalibrationSettings, text: CalibrationText) -> dict[str, Any]:
    """What swsc_calibration.json says: this text's name, and traces of it and of what the source was calibrated on before."""
    name = calibration.calibration and redacted(calibration.calibration)
    return {"text": name, "traces": sorted(text.traces | known_traces(source.store))}
