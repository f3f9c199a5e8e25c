"""`swsc compress MODEL OUTPUT`: compress a checkpoint, then evaluate and push the output if the flags ask for it."""

import argparse

from jobs.command_line.flags import settings_of
from jobs.command_line.results import print_compression, print_evaluation, print_preset_hint
from pipeline.errors import ConfigError
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.loading import SourceSettings
from pipeline.settings.push import PushSettings
from pipeline.settings.validation import validated
from pipeline.texts.texts import has_columns
from pipeline.verbs.compress import CompressRequest, CompressResult, compress


def run(arguments: argparse.Namespace) -> int:
    compress(request_of(arguments), on_stage=_print_stage)
    return 0


def request_of(arguments: argparse.Namespace) -> CompressRequest:
    """The request of a command; ConfigError for mistakes in flags and config file."""
    settings = settings_of(
        arguments, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings, SourceSettings
    )
    _require_used_flags(arguments)
    calibration = settings[CalibrationSettings]
    return CompressRequest(
        arguments.model,
        arguments.output,
        settings[CompressSettings],
        calibration,
        settings[ClusterSettings],
        settings[OutputSettings],
        settings[SourceSettings],
        evaluation=_evaluation_of(arguments, calibration.trust_remote_code) if arguments.text else None,
        push=arguments.push,
        push_settings=PushSettings(private=arguments.private),
        config=arguments.config,
    )


def _require_used_flags(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for flags that would be ignored."""
    unused = sorted({"seqlen", "windows"} & vars(arguments).keys())
    if unused and not arguments.text:
        raise ConfigError(f"{', '.join(unused)}: only apply with --text; add it, or remove them")
    if arguments.private and not arguments.push:
        raise ConfigError("private: only applies with --push; add it, or remove --private")


def _evaluation_of(arguments: argparse.Namespace, trusted: bool) -> EvaluateSettings:
    values = {name: value for name, value in vars(arguments).items() if name in {"text", "seqlen", "windows"}}
    if "text_column" in arguments and has_columns(
        arguments.text
    ):  # otherwise it names a column of the calibration text
        values["text_column"] = arguments.text_column
    return validated(EvaluateSettings, values | {"trust_remote_code": trusted})


def _print_stage(result: CompressResult) -> None:
    """Print what the last stage added."""
    if result.commit:
        print(f"{result.request.output}: pushed, {result.commit}")
    elif result.evaluation:
        print_evaluation(result.evaluation, result.note)
    else:
        print_compression(result)
        print_preset_hint(result)
