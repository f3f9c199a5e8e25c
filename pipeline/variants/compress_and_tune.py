"""The compression of one variant, followed by tuning if its settings ask for it."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.source import open_checkpoint
from pipeline.device import Arithmetic
from pipeline.outputs.owned_files import REPORT
from pipeline.outputs.preflight import UNTUNED_PREFIX
from pipeline.outputs.report_rows import compressed_rows, measured_rows
from pipeline.settings.compression import CompressSettings
from pipeline.storage.cache_key import cache_name
from pipeline.storage.records import report_damaged_cache
from pipeline.storage.shared_lease import remove_if_unleased, shared_lease
from pipeline.storage.store import Store
from pipeline.tuning.flow import Tuning
from pipeline.tuning.windows import TuningWindows
from pipeline.variants.compress import compress_model
from pipeline.variants.compression import Compression, Compute, Target, TunedModel
from pipeline.variants.tuned_variant import TunedVariant

# Prefix of the name, in the cache, of a tuned model that a sweep evaluates.
VARIANT = "variant"


def compress_and_tune(compression: Compression, target: Target, compute: Compute) -> dict[str, object]:
    """Carry out a plan into the target directory, and return the report.

    A model is compressed into the cache before it is tuned; later runs that need the same model reuse it.

    Raises:
        ConfigError: tuning needs more calibration windows.
        All errors of `compress_model`.
    """
    calibrated, settings = compression.calibrated, compression.settings
    if not settings.epochs or calibrated is None:
        return compress_model(compression, target, compute)
    text = TuningWindows(calibrated.ids, settings.epochs, settings.seed)
    location = _untuned_location(compression, compute.arithmetic)
    with ExitStack() as uses:  # other runs must not remove these directories before the output is written

        def tune() -> TunedModel:
            store = Store.at(location)
            uses.enter_context(shared_lease(store))
            with report_damaged_cache(store):
                untuned = replace(compression, settings=_untuned_settings(settings))
                compress_model(untuned, Target(location, waits=True), compute)
            tuning = _tuning(compression, text, location, compute.arithmetic)
            uses.enter_context(shared_lease(tuning.store))
            tuned, summary = tuning.run(compute.pools)
            return TunedModel(tuned, measured_rows(store.read_json(REPORT)), summary)

        return compress_model(compression, target, compute, tune)


def tuned_variant(compression: Compression, compute: Compute, uses: ExitStack) -> TunedVariant:
    """A tuned row of a sweep, as a directory in the cache that other runs cannot remove until `uses` is closed."""
    location = _cached_location(VARIANT, compression, compute.arithmetic)
    uses.enter_context(shared_lease(Store.at(location)))
    with report_damaged_cache(Store.at(location)):
        report = compress_and_tune(compression, Target(location, waits=True), compute)
    tuning = report["tuning"]
    applied = isinstance(tuning, Mapping) and bool(tuning["applied"])
    return TunedVariant(open_checkpoint(location), compressed_rows(report), applied)


def remove_intermediates(compression: Compression, arithmetic: Arithmetic, keep_untuned: bool) -> None:
    """Remove the intermediate results of a finished tuned row: the state of its tuning, and the untuned model.

    A directory that another run uses stays; that run removes it.

    Args:
        keep_untuned: another row will be tuned from the same untuned model.
    """
    calibrated, settings = compression.calibrated, compression.settings
    assert calibrated is not None  # every tuned model is calibrated
    location = _untuned_location(compression, arithmetic)
    with shared_lease(Store.at(location)):
        if not Store.at(location).exists(MANIFEST):
            return
        text = TuningWindows(calibrated.ids, settings.epochs, settings.seed)
        _tuning(compression, text, location, arithmetic).forget()
    if not keep_untuned:
        remove_if_unleased(Store.at(location))


def _tuning(compression: Compression, text: TuningWindows, untuned_location: str, arithmetic: Arithmetic) -> Tuning:
    assert compression.calibrated is not None  # its windows are those of `text`
    cache = compression.calibrated.cache
    return Tuning(compression.source, untuned_location, text, compression.calibration, cache, arithmetic)


def _untuned_settings(settings: CompressSettings) -> CompressSettings:
    return settings.model_copy(update={"tune": 0, "format": "swsc"})


def _untuned_location(compression: Compression, arithmetic: Arithmetic) -> str:
    """Directory of the model before its tuning."""
    untuned = replace(compression, settings=_untuned_settings(compression.settings))
    return _cached_location(UNTUNED_PREFIX, untuned, arithmetic)


def _cached_location(kind: str, compression: Compression, arithmetic: Arithmetic) -> str:
    """Directory in the cache of a calibrated compression."""
    assert compression.calibrated is not None
    return f"{compression.calibrated.cache}/{cache_name(kind, compression.identity(arithmetic))}"
