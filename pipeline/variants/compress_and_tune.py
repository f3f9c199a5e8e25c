"""A compression from plan to finished directory, tuned or not."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools, log_and_release
from pipeline.outputs.owned_files import REPORT
from pipeline.outputs.preflight import STAGED, identity_of
from pipeline.outputs.report import compressed_rows
from pipeline.outputs.report_rows import measured_rows
from pipeline.planning.plan import Plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.compression import CompressSettings
from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.sweep import Variant
from pipeline.storage.cache_key import CALIBRATION_KEY, cache_name
from pipeline.storage.records import report_damaged_cache
from pipeline.storage.shared_lease import remove_if_unleased, shared_lease
from pipeline.storage.store import Store
from pipeline.tuning.flow import Tuning, TuningWindows
from pipeline.variants.compress import Calibrated, TunedModel, compress_model
from pipeline.variants.tuned_variant import TunedVariant

VARIANT = "variant"  # how the name of a tuned model in the cache begins that a sweep measures


def produce(
    source: Checkpoint, plan: Plan, output: str, settings: CompressSettings, calibration: CalibrationSettings,
    calibrated: Calibrated | None, arithmetic: Arithmetic, pools: Pools, overwrite: bool = False,
    on_wait: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carry out `plan` into `output`, and return the report.

    To be tuned, a model is first compressed into the cache, where it is found again by whoever needs the same.

    Raises:
        As `compress_model`; ConfigError: fewer calibration windows than tuning needs.
    """
    if not settings.epochs or calibrated is None:
        return compress_model(source, plan, output, settings, arithmetic, pools, calibrated, None, overwrite, on_wait)
    text = TuningWindows(calibrated.ids, settings.epochs, settings.seed)
    untuned = _untuned(settings)
    staging = _staging(source, settings, calibrated, arithmetic)

    kept = ExitStack()  # of the cache, until the output is written: another run may be done with the same

    def tune() -> TunedModel:
        kept.enter_context(shared_lease(Store.at(staging)))
        with report_damaged_cache(Store.at(staging)):
            compress_model(
                source, plan, staging, untuned, arithmetic, pools, calibrated, on_wait=log_and_release(pools)
            )
        tuning = Tuning(source, staging, text, calibration, calibrated.cache, arithmetic)
        kept.enter_context(shared_lease(tuning.store))
        tuned, about = tuning.run(pools)
        return TunedModel(tuned, measured_rows(Store.at(staging).read_json(REPORT)), about)

    with kept:
        return compress_model(source, plan, output, settings, arithmetic, pools, calibrated, tune, overwrite, on_wait)


def produce_variant(
    source: Checkpoint, plan: Plan, variant: Variant, calibration: CalibrationSettings, calibrated: Calibrated, arithmetic: Arithmetic,
    pools: Pools, kept: ExitStack,
) -> TunedVariant:  # fmt: skip
    """A tuned row of a sweep, as a directory in the cache, which is kept there until `kept` is closed."""
    settings = _settings_of(variant)
    output = _place(VARIANT, source, settings, calibrated, arithmetic)
    kept.enter_context(shared_lease(Store.at(output)))
    with report_damaged_cache(Store.at(output)):
        report = produce(
            source, plan, output, settings, calibration, calibrated, arithmetic, pools, on_wait=log_and_release(pools)
        )
    return TunedVariant(open_checkpoint(output), compressed_rows(report), report["tuning"])


def forget_stages(
    source: Checkpoint, variant: Variant, calibration: CalibrationSettings, calibrated: Calibrated, arithmetic: Arithmetic,
    shared: bool,
) -> None:  # fmt: skip
    """Remove what a finished tuned row was made of: the state of its tuning and, unless it is `shared`, the compressed model.

    What another run uses at the time stays; it is that run's to remove.
    """
    settings = _settings_of(variant)
    staging = _staging(source, settings, calibrated, arithmetic)
    with shared_lease(Store.at(staging)):
        if not Store.at(staging).exists(MANIFEST):
            return
        text = TuningWindows(calibrated.ids, settings.epochs, settings.seed)
        Tuning(source, staging, text, calibration, calibrated.cache, arithmetic).forget()
    if not shared:
        remove_if_unleased(Store.at(staging))


def _settings_of(variant: Variant) -> CompressSettings:
    given = {key: getattr(variant, key) for key in variant.model_fields_set & MatrixSettings.model_fields.keys()}
    return CompressSettings(**given)


def _untuned(settings: CompressSettings) -> CompressSettings:
    return settings.model_copy(update={"tune": 0, "format": "swsc"})


def _staging(source: Checkpoint, settings: CompressSettings, calibrated: Calibrated, arithmetic: Arithmetic) -> str:
    """Directory of the model that is yet to be tuned."""
    return _place(STAGED, source, _untuned(settings), calibrated, arithmetic)


def _place(
    kind: str, source: Checkpoint, settings: CompressSettings, calibrated: Calibrated, arithmetic: Arithmetic
) -> str:
    """A directory in the cache for one model, made in one way."""
    identity = identity_of(source, settings, arithmetic) | {CALIBRATION_KEY: calibrated.fingerprint}
    return f"{calibrated.cache}/{cache_name(kind, identity)}"
