"""`swsc sweep CONFIG --out DIR`: models × variants × texts in one run, results as table, JSON and Parquet."""

import argparse
import sys
from functools import partial
from pathlib import Path

from jobs.flags import add_settings, cluster_of
from pipeline.config import ClusterSettings, SweepSettings, read_config, validated
from pipeline.errors import RunError
from pipeline.model.store import Store
from pipeline.report.files import write_results
from pipeline.report.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the sweep; configs/ has examples")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory of the results")
    parser.add_argument("--model", action="append", default=[], help="a model, in place of the file's; may be repeated")
    parser.add_argument("--text", help="the text of every evaluation, in place of the file's")
    for flag in ("--seqlen", "--windows"):
        parser.add_argument(flag, help="of every evaluation, in place of the file's")
    add_settings(parser, ClusterSettings)


def run(arguments: argparse.Namespace) -> int:
    settings, cluster = sweep_settings(arguments), cluster_of(arguments)
    return carry_out(settings, cluster, arguments.out)


def carry_out(settings: SweepSettings, cluster: ClusterSettings, out: str) -> int:
    """Run a sweep, write and print its results; RunError if a variant failed, after everything is written."""
    from pipeline.flows.sweep import run_sweep
    from pipeline.run.cluster import make_pool

    store, asked = Store.at(out), settings.model_dump(mode="json")
    store.write_json("settings.json", asked)  # a directory that cannot be written is told of now, not at the end
    result = run_sweep(settings, partial(make_pool, cluster))
    write_results(store, result.rows, result.tensors, {"settings": asked, "seconds": result.seconds, "argv": sys.argv})
    keys = ["variant", "paper_bits", "bits_per_weight", "whole_model_bits_per_weight", "relative_error"]
    for model in settings.models:
        rows = [row for row in result.rows if row["model"] == model]
        print_table(rows, [*keys, "perplexity", "reference", "error"], title=model)
    if settings.matrices:
        print_table(result.tensors, ["name", "variant", "bits_per_weight", "mean_squared_error"])
    print(f"{out}/results.json, results.parquet, tensors.parquet: {len(result.rows)} rows, {result.seconds:.1f} s")
    if result.failed:
        causes = "; ".join(sorted({f"{row['variant']}: {row['error']}" for row in result.failed}))
        raise RunError(f"{len(result.failed)} of {len(result.rows)} rows failed, the others are written: {causes}")
    return 0


def sweep_settings(arguments: argparse.Namespace) -> SweepSettings:
    """The file's settings with what the flags put in their place."""
    values = read_config(Path(arguments.config))
    if arguments.model:
        values["models"] = arguments.model
    replaced = {key: getattr(arguments, key) for key in ("text", "seqlen", "windows")}
    replaced = {key: value for key, value in replaced.items() if value is not None}
    if replaced:
        values["evaluations"] = [{**one, **replaced} for one in values.get("evaluations") or [{}]]
    return validated(SweepSettings, values, arguments.config)
