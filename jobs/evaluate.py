"""`swsc evaluate MODEL`: measure perplexity (`--text`), run tasks of lm-evaluation-harness (`--tasks`), or both."""

import argparse
from collections.abc import Mapping

from jobs.command_line.flags import settings_of
from jobs.command_line.results import print_evaluation, print_lm_eval
from pipeline.errors import ConfigError
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluation import EvaluateSettings, MeasureSettings
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.settings.loading import SourceSettings
from pipeline.verbs.evaluate import EvaluateRequest, EvaluateResult, evaluate

# Flag that requests a measurement -> the settings of that measurement.
_MEASUREMENTS: Mapping[str, type[MeasureSettings]] = {"text": EvaluateSettings, "tasks": LmEvalSettings}


def run(arguments: argparse.Namespace) -> int:
    evaluate(request_of(arguments), on_stage=_print_stage)
    return 0


def request_of(arguments: argparse.Namespace) -> EvaluateRequest:
    """The request of a command; ConfigError for mistakes in flags."""
    kinds = [kind for flag, kind in _MEASUREMENTS.items() if flag in arguments]
    if kinds:
        _require_used_flags(arguments, kinds)
    settings = settings_of(arguments, *kinds, ClusterSettings, SourceSettings)
    return EvaluateRequest(
        arguments.model,
        settings[EvaluateSettings] if "text" in arguments else None,
        settings[LmEvalSettings] if "tasks" in arguments else None,
        settings[ClusterSettings],
        settings[SourceSettings],
        arguments.json,
        arguments.card,
        arguments.uncompressed,
        arguments.verify,
    )


def _require_used_flags(arguments: argparse.Namespace, kinds: list[type[MeasureSettings]]) -> None:
    """Raise ConfigError for flags of a measurement that was not requested."""
    used = {name for kind in kinds for name in kind.model_fields}
    for flag, kind in _MEASUREMENTS.items():
        unused = sorted(vars(arguments).keys() & (kind.model_fields.keys() - used))
        if unused and kind not in kinds:
            raise ConfigError(f"{', '.join(unused)}: only apply with --{flag}; add it, or remove them")


def _print_stage(result: EvaluateResult) -> None:
    """Print what the last measurement added."""
    if result.lm_eval:
        print_lm_eval(result)
    elif result.perplexity:
        print_evaluation(result.perplexity, result.note)
