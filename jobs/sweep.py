"""`swsc sweep CONFIG --out DIR`: compress and evaluate models, variants and texts in one run."""

import argparse
from functools import partial
from pathlib import Path

from jobs.command_line.flags import SWEEP_KEY, cluster_of
from jobs.command_line.results import print_sweep, print_sweep_files
from pipeline.errors import ConfigError
from pipeline.settings.compression import CompressSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import read_config, validated
from pipeline.verbs.sweep import SweepRequest, require_complete, sweep


def run(arguments: argparse.Namespace) -> int:
    settings, cluster = sweep_settings(arguments), cluster_of(arguments)
    request = SweepRequest(settings, arguments.out, cluster, arguments.config, arguments.overwrite)
    result = sweep(request, on_unwritten=partial(print_sweep, settings))
    print_sweep(settings, result)
    print_sweep_files(request.out, result)
    require_complete(result)
    return 0


def sweep_settings(arguments: argparse.Namespace) -> SweepSettings:
    """The settings of the config file, in which flags replace values."""
    values = read_config(Path(arguments.config))
    if SWEEP_KEY not in values and values.keys() & CompressSettings.model_fields.keys():
        raise ConfigError(
            f"{arguments.config}: describes one compression, not a sweep; run it by"
            f" `swsc compress MODEL OUTPUT --config {arguments.config}`"
        )
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
    replaced = {name: getattr(arguments, name) for name in ("text", "text_column", "seqlen", "windows", "dtype")}
    replaced = {name: value for name, value in replaced.items() if value is not None}
    if replaced:
        evaluations = values.get("evaluations") or [{}]
        if not isinstance(evaluations, list) or not all(isinstance(item, dict) for item in evaluations):
            raise ConfigError(f"{arguments.config}: evaluations: expected a list of mappings")
        values["evaluations"] = [{**item, **replaced} for item in evaluations]
    return validated(SweepSettings, values, arguments.config)
