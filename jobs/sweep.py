"""`swsc sweep CONFIG --out DIR`: models × variants × texts in one run, results as table, JSON and Parquet."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from jobs.command_line.flags import cluster_of
from jobs.evaluate import protocol
from pipeline.console import log
from pipeline.errors import ConfigError, OutputError, RunError
from pipeline.outputs.owned_files import clear_unfinished
from pipeline.outputs.preflight import require_cache
from pipeline.redaction import redacted_argv, redacted_values
from pipeline.report.result_files import RESULTS, write_results
from pipeline.report.tables import print_table
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import read_config, validated
from pipeline.storage.lease import acquire_lease
from pipeline.storage.local_files import final_name
from pipeline.storage.paths import UserPath, require_directory, require_disjoint_paths, user_paths
from pipeline.storage.store import Store
from pipeline.sweep.rows import SweepResult
from pipeline.sweep.sweep import Sweep

_INTERRUPTED = "interrupted"  # folder of what a sweep measured that was stopped
_MARK = ".swsc-sweep"  # an empty file, by which a directory of results is known


def run(arguments: argparse.Namespace) -> int:
    settings, cluster = sweep_settings(arguments), cluster_of(arguments)
    require_disjoint_paths(UserPath.at("--out", arguments.out), user_paths([("CONFIG", arguments.config)]))
    return carry_out(settings, cluster, arguments.out)


def carry_out(settings: SweepSettings, cluster: ClusterSettings, out: str) -> int:
    """Run a sweep, write and print its results; RunError if a variant failed, after everything is written.

    What was measured is written even when the sweep is interrupted or fails as a whole; results of an earlier sweep in
    the same directory stay until there are as many to put in their place.
    """
    _require_places(settings, out)
    sweep = Sweep(settings)
    store = begin(out)
    with acquire_lease(store):
        clear_unfinished(store, [*RESULTS, _MARK])  # of a sweep that was killed while it wrote them
        result = _measured(sweep, settings, cluster, store)
    store.below(".swsc").remove_empty()
    print_results(settings, result)
    print(f"{out}/results.json, results.parquet, tensors.parquet: {len(result.rows)} rows, {result.seconds:.1f} s")
    if result.failed:
        causes = "; ".join(sorted({f"{row['variant']}: {row['error']}" for row in result.failed}))
        raise RunError(f"{len(result.failed)} of {len(result.rows)} rows failed, the others are written: {causes}")
    return 0


def _require_places(settings: SweepSettings, out: str) -> None:
    """Raise OutputError if what is written would change what is read."""
    models = user_paths(("model", model) for model in settings.models)
    texts = [("text", one.text) for one in settings.evaluations]
    require_disjoint_paths(
        UserPath.at("--out", out), [*models, *user_paths([*texts, ("calibration", settings.calibration)])]
    )
    if settings.cache_dir:
        require_cache(settings.cache_dir, models)


def _measured(sweep: Sweep, settings: SweepSettings, cluster: ClusterSettings, store: Store) -> SweepResult:
    """Run the sweep and write its results, whatever stops it."""
    from pipeline.engine.ray_backend.arithmetic import arithmetic_of
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    arithmetic = arithmetic_of(cluster)  # before workers take all GPUs: it may have to ask one
    with closing(sweep), worker_pools(cluster, largest=sweep.worker_bytes) as pools:
        sweep.calibrate(pools, f"{store.root}/results.json", arithmetic)
        pool = pools(sweep.total_tasks, sweep.stage)
        try:
            sweep.run(pool)
        finally:
            result = sweep.result()
            if result.measured or sys.exc_info()[0] is None:
                about = {"settings": redacted_values(settings.model_dump(mode="json")), "seconds": result.seconds}
                about["argv"] = redacted_argv()
                _write(_place_of(store, result), settings, result, about)
        sweep.forget_measured()
    return result


def _place_of(store: Store, result: SweepResult) -> Store:
    """Where results go: of a sweep that was stopped not in the place of an earlier one's, if those are more."""
    if sys.exc_info()[0] is None or result.measured >= _measured_before(store):
        return store
    place = store.below(_INTERRUPTED)
    log(f"note: {store.root} holds more results of an earlier sweep, which stay; this one's go to {place.root}")
    return place


def _measured_before(store: Store) -> int:
    """Rows of an earlier sweep that hold what was asked for; 0 where there are none, or none that can be read."""
    try:
        return sum(not row["error"] for row in store.read_json("results.json")["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _write(store: Store, settings: SweepSettings, result: SweepResult, about: dict[str, Any]) -> None:
    """Write the results; what no disk takes is printed at least, for hours may lie in it."""
    try:
        write_results(store, result.rows, result.tensors, about)
    except OSError:
        print_results(settings, result)
        raise


def begin(out: str) -> Store:
    """The store of the results; a directory that cannot be written, or is not ours, is told of before any work."""
    store = Store.at(out)
    require_directory(store)
    strange = [name for name in store.entries() if final_name(name) != _MARK]
    if strange and not store.exists(_MARK):
        raise OutputError(f"{out}: not empty and not the results of a sweep; choose an empty or new directory")
    store.write(_MARK, [])
    return store


def print_results(settings: SweepSettings, result: SweepResult) -> None:
    """A table a model, and one row a matrix if that was asked for."""
    keys = ["variant", "paper_bits", "bits_per_weight", "whole_model_bits_per_weight", "relative_error", "tuning"]
    texts = ["text", "seqlen"] if len(settings.evaluations) > 1 else []
    for model in settings.models:
        rows = [row for row in result.rows if row["model"] == model]
        print_table(rows, [*keys, *texts, "perplexity", "reference", "error"], title=model)
    for row in {(row["model"], row.get("text"), row.get("seqlen")): row for row in result.rows}.values():
        if row.get("perplexity") is not None:
            print(protocol(row))
    if settings.matrices:
        print_table(result.tensors, ["model", "name", "variant", "bits_per_weight", "mean_squared_error"])


def sweep_settings(arguments: argparse.Namespace) -> SweepSettings:
    """The file's settings with what the flags put in their place."""
    values = read_config(Path(arguments.config))
    if arguments.model:
        values["models"] = arguments.model
    if arguments.calibration:
        values["calibration"] = arguments.calibration
    if arguments.text_column and values.get("calibration"):
        values["text_column"] = arguments.text_column
    if arguments.keep_tuned:
        values["keep_tuned"] = True
    if "trust_remote_code" in arguments:
        values["trust_remote_code"] = True
    replaced = {key: getattr(arguments, key) for key in ("text", "text_column", "seqlen", "windows", "dtype")}
    replaced = {key: value for key, value in replaced.items() if value is not None}
    if replaced:
        given = values.get("evaluations") or [{}]
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise ConfigError(f"{arguments.config}: evaluations: wanted a list of mappings")
        values["evaluations"] = [{**one, **replaced} for one in given]
    return validated(SweepSettings, values, arguments.config)
