"""The verb sweep: models, variants and evaluation texts in, a directory of results out."""

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

from pipeline.console import log
from pipeline.errors import ConfigError, OutputError, RunError
from pipeline.outputs.owned_files import clear_unfinished
from pipeline.outputs.preflight import require_cache
from pipeline.redaction import redacted_argv, redacted_values
from pipeline.report.result_files import RESULTS, write_results
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.storage.lease import acquire_lease
from pipeline.storage.local_files import final_name
from pipeline.storage.paths import UserPath, require_directory, require_disjoint_paths, user_paths
from pipeline.storage.store import Store
from pipeline.sweep.rows import SweepResult
from pipeline.sweep.sweep import Sweep
from pipeline.variants.calibrate_and_allocate import cache_location
from pipeline.variants.compression import Compute

# Folder, inside the directory of results, for the results of a sweep that was stopped.
_INTERRUPTED = "interrupted"
# An empty file that marks a directory as one of results.
_MARKER = ".swsc-sweep"
# Settings that change no result.
_WITHOUT_EFFECT = frozenset({"cache_dir", "keep_tuned", "matrices", "moment_gib"})


@dataclass(frozen=True)
class SweepRequest:
    """A sweep whose results go to the directory `out`.

    Attributes:
        config: file that the settings were read from, which the results must not replace.
        overwrite: replace results of a sweep with other settings.
    """

    settings: SweepSettings
    out: str
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    config: str | None = None
    overwrite: bool = False

    def require_valid(self) -> None:
        """Raise ConfigError without models, OutputError if results or cache would change something that is read."""
        settings = self.settings
        if not settings.models:
            raise ConfigError("models: none given; list them in the file, or give --model")
        models = user_paths(("model", model) for model in settings.models)
        texts = user_paths(
            [
                *(("text", evaluation.text) for evaluation in settings.evaluations),
                ("calibration", settings.calibration),
                ("CONFIG", self.config),
            ]
        )
        require_disjoint_paths(UserPath.at("--out", self.out), [*models, *texts])
        if settings.cache_dir:
            require_cache(settings.cache_dir, models)


def sweep(request: SweepRequest, on_unwritten: Callable[[SweepResult], None] = lambda result: None) -> SweepResult:
    """Run a sweep and write its results, even if it is interrupted or fails as a whole.

    Results of an earlier sweep with the same settings in the same directory are replaced once there are as many new
    ones.

    Args:
        on_unwritten: receives results that cannot be written, before the error is raised.

    Raises:
        ConfigError, CheckpointError, TextError, OutputError: a mistake in the request or in a file that it names.
        RunError: the sweep failed as a whole. A variant that fails has an error in its rows instead; see
            `require_complete`.
    """
    request.require_valid()
    runs = Sweep(request.settings)
    store = _results_directory(request.out)
    if not request.overwrite:
        _require_same_sweep(store, request.settings)
    from pipeline.engine.ray_backend.arithmetic import arithmetic_of
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    arithmetic = arithmetic_of(request.cluster)  # before the workers take all GPUs: it may have to ask one
    with closing(runs), worker_pools(request.cluster, optional=[runs.stage]) as pools:
        runs.choose_blocks(pools.room())
        pools.require_workers(runs.stage)
        store.write(_MARKER, [])
        with acquire_lease(store):
            clear_unfinished(store, [*RESULTS, _MARKER])  # a sweep that was killed may have left temporary files
            result = _measured(runs, request, store, Compute(pools, arithmetic), on_unwritten)
    store.below(".swsc").remove_empty()
    return result


def require_complete(result: SweepResult) -> None:
    """Raise RunError that names the failed rows of a sweep and their causes."""
    if result.failed:
        causes = "; ".join(sorted({f"{row['variant']}: {row['error']}" for row in result.failed}))
        raise RunError(f"{len(result.failed)} of {len(result.rows)} rows failed, the others are written: {causes}")


def _results_directory(out: str) -> Store:
    """The directory of results; OutputError if it has other content or cannot be written."""
    store = Store.at(out)
    require_directory(store)
    other_names = [name for name in store.entries() if final_name(name) != _MARKER]
    if other_names and not store.exists(_MARKER):
        raise OutputError(f"{out}: not empty and not the results of a sweep; choose an empty or new directory")
    return store


def _require_same_sweep(store: Store, settings: SweepSettings) -> None:
    """Raise OutputError if the directory holds results of other settings; results that cannot be read do not count."""
    earlier = _earlier_results(store).get("settings")
    if not isinstance(earlier, Mapping):
        return
    present = _settings_json(settings)
    different = sorted(
        name for name in present.keys() - _WITHOUT_EFFECT if name not in earlier or earlier[name] != present[name]
    )
    if different:
        raise OutputError(
            f"{store.root}: holds the results of another sweep ({', '.join(different)} differ); choose another --out,"
            " or replace them by --overwrite"
        )


def _measured(
    runs: Sweep, request: SweepRequest, store: Store, compute: Compute, on_unwritten: Callable[[SweepResult], None]
) -> SweepResult:
    """Run the sweep and write what it measured, whatever stops it."""
    runs.calibrate(compute, cache_location(request.settings, f"{store.root}/results.json"))
    try:
        runs.run(compute.pools)
    finally:
        result = runs.result()
        if result.measured or sys.exc_info()[0] is None:
            _write(_results_store(store, result), request, result, on_unwritten)
    runs.remove_evaluated()
    return result


def _results_store(store: Store, result: SweepResult) -> Store:
    """Where to write: a sweep that was stopped must not replace more results of an earlier one."""
    if sys.exc_info()[0] is None or result.measured >= _earlier_rows(store):
        return store
    interrupted = store.below(_INTERRUPTED)
    log(f"note: {store.root} keeps the results of an earlier sweep, which are more; these go to {interrupted.root}")
    return interrupted


def _earlier_rows(store: Store) -> int:
    """Number of rows without an error that an earlier sweep wrote; 0 if there are none that can be read."""
    rows = _earlier_results(store).get("rows")
    return sum(isinstance(row, Mapping) and not row.get("error") for row in rows) if isinstance(rows, list) else 0


def _earlier_results(store: Store) -> Mapping[str, object]:
    """results.json of an earlier sweep; empty if there is none that can be read."""
    try:
        results = store.read_json(RESULTS[0])
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, Mapping) else {}


def _settings_json(settings: SweepSettings) -> Mapping[str, object]:
    """The settings as results.json has them."""
    return cast(Mapping[str, object], redacted_values(settings.model_dump(mode="json")))


def _write(
    store: Store, request: SweepRequest, result: SweepResult, on_unwritten: Callable[[SweepResult], None]
) -> None:
    header = {"settings": _settings_json(request.settings), "seconds": result.seconds, "argv": redacted_argv()}
    try:
        write_results(store, result.rows, result.tensors, header)
    except OSError:
        on_unwritten(result)
        raise
