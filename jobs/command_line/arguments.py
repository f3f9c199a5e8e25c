"""The arguments of each verb. This module imports neither torch nor Ray, so that help and mistakes show at once."""

from collections.abc import Callable

from jobs.command_line.flags import add_setting, add_settings
from jobs.command_line.parser import Parser
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.sources.gguf import DEFAULT_DTYPE
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.settings.loading import LoadSettings, SourceSettings
from pipeline.settings.push import PushSettings
from pipeline.settings.sweep import SweepSettings

SHELLS = ("bash", "zsh", "fish")
_MODEL = (
    "Checkpoint: a directory (local, s3://…, gs://…) with safetensors files, a local GGUF file, or a Hub id"
    " ORG/NAME[@REVISION]."
)
_WRITTEN = "Output directory of compress or restore."
_RESULTS = (
    "Directory of the results: a new one, or that of the same sweep, whose results are replaced once there are as many"
    " new ones (required)."
)
_OUTPUT, _HUB, _EVALUATION = "output", PushSettings.groups[0], "evaluation after the compression"
_COMPRESSION = (CompressSettings, CalibrationSettings, OutputSettings)


def add_arguments(verb: str, parser: Parser) -> None:
    """Add the arguments of a verb to its parser."""
    _ARGUMENTS[verb](parser)


def _add_config(parser: Parser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings, named like the flags; flags override the file."
    )


def _demo(parser: Parser) -> None:
    output = parser.group(_OUTPUT)
    output.add_argument(
        "--out", metavar="DIR", default="demo-output", help="Directory of all files of the demo. [default: %(default)s]"
    )
    output.add_argument("--fetch-only", action="store_true", help="Only download the model and the text.")
    add_settings(parser, ClusterSettings)


def _plan(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_config(parser)
    add_settings(parser, *_COMPRESSION, ClusterSettings)
    output = parser.group(_OUTPUT)
    output.add_argument("--output", metavar="DIR", help="Also check that the disk of DIR has room for the output.")
    output.add_argument("--json", metavar="FILE", help="Also write the plan to FILE, as JSON.")


def _compress(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "output", metavar="OUTPUT", help="Directory to write: a new one, or that of an interrupted run."
    )
    _add_config(parser)
    add_settings(parser, *_COMPRESSION, SourceSettings, ClusterSettings)
    evaluation, hub = parser.group(_EVALUATION), parser.group(_HUB)
    evaluation.add_argument(
        "--text",
        metavar="TEXT",
        help="Measure the perplexity of the output on this text, as `swsc evaluate --text` does.",
    )
    add_setting(evaluation, EvaluateSettings, "seqlen")
    add_setting(evaluation, EvaluateSettings, "windows")
    hub.add_argument("--push", metavar="REPO_ID", help="Push the finished output to the Hub, as `swsc push` does.")
    hub.add_argument("--private", action="store_true", help="With --push: create the repository as a private one.")


def _convert(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF file.")
    parser.add_argument("output", metavar="OUTPUT", help="New local directory.")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default=DEFAULT_DTYPE,
        help="Data type of the weights. [default: %(default)s]",
    )


def _verify(parser: Parser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help=_WRITTEN)
    add_settings(parser, ClusterSettings)


def _restore(parser: Parser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="Directory of a compressed model.")
    parser.add_argument("dense", metavar="DENSE", help="Directory to write.")
    output = parser.group(_OUTPUT)
    output.add_argument(
        "--adapter",
        action="store_true",
        help="Write the low-rank factors as a LoRA adapter for PEFT, to"
        f" DENSE/{ADAPTER_FOLDER}, instead of adding them to the weights.",
    )
    output.add_argument("--verify", action="store_true", help="Check OUTPUT first, as `swsc verify` does.")
    add_setting(output, OutputSettings, "overwrite", default=False)
    add_setting(output, LoadSettings, "trust_remote_code", default=False)
    add_settings(parser, ClusterSettings)


def _evaluate(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_MODEL} Compressed and restored models are read as well.")
    add_settings(parser, EvaluateSettings, LmEvalSettings, ClusterSettings, SourceSettings)
    result = parser.group("result")
    result.add_argument("--json", metavar="FILE", help="Also write the result to FILE, as JSON.")
    result.add_argument(
        "--card", action="store_true", help="Also write the perplexity into the model card of a local output."
    )
    result.add_argument(
        "--uncompressed",
        metavar="FILE",
        help="With --card: result of the uncompressed model, as --json wrote it, to show beside it.",
    )
    result.add_argument(
        "--verify", action="store_true", help="Check the files of an output first, as `swsc verify` does."
    )


def _push(parser: Parser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help=_WRITTEN)
    parser.add_argument(
        "repo", metavar="REPO_ID", help="Repository on the Hub, as ORG/NAME; it is created if it does not exist."
    )
    add_settings(parser, PushSettings, ClusterSettings)


def _sweep(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the sweep; configs/ has examples.")
    sweep = parser.group("sweep")
    sweep.add_argument("--out", metavar="DIR", required=True, help=_RESULTS)
    sweep.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        default=[],
        help="Model, in place of those in CONFIG; may be repeated.",
    )
    add_setting(sweep, SweepSettings, "keep_tuned", default=False)
    sweep.add_argument("--overwrite", action="store_true", help="Replace results of another sweep in DIR.")
    sweep.add_argument("--calibration", metavar="TEXT", help="Calibration text, in place of that in CONFIG.")
    evaluations = parser.group("all evaluations, in place of the values in CONFIG")
    evaluations.add_argument("--text", metavar="TEXT", help="Evaluation text, as in `swsc evaluate`.")
    for name in ("text_column", "seqlen", "windows", "dtype"):
        shown = EvaluateSettings.model_fields[name].description
        add_setting(evaluations, EvaluateSettings, name, default=None, help=shown)
    add_settings(parser, LoadSettings, ClusterSettings)


def _completion(parser: Parser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"Shell: {', '.join(SHELLS)}.")


_ARGUMENTS: dict[str, Callable[[Parser], None]] = {
    "demo": _demo,
    "plan": _plan,
    "compress": _compress,
    "convert": _convert,
    "verify": _verify,
    "restore": _restore,
    "evaluate": _evaluate,
    "push": _push,
    "sweep": _sweep,
    "completion": _completion,
}
