"""The arguments of each verb. Nothing here needs torch, Ray or transformers: help and mistakes of a command show at once."""

import argparse
from collections.abc import Callable

from jobs.flags import MODEL, add_config, add_settings
from pipeline.config import (
    CalibrationSettings,
    ClusterSettings,
    CompressSettings,
    EvaluateSettings,
    LoadSettings,
    OutputSettings,
    PushSettings,
    SourceSettings,
    SweepSettings,
)
from pipeline.model.extras import ADAPTER
from pipeline.model.gguf import DTYPE
from pipeline.task_config import TaskSettings


def add_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    """Give a verb's parser its arguments."""
    _ARGUMENTS[verb](parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", default="demo-output", help="directory to work in (default: %(default)s)"
    )
    parser.add_argument("--fetch-only", action="store_true", help="fetch model and text, and stop there")
    add_settings(parser, ClusterSettings)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_config(parser)
    add_settings(parser, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings)
    parser.add_argument("--output", metavar="DIR", help="also say whether the disk of DIR has room")
    parser.add_argument("--json", metavar="FILE", help="also write the plan there")


def _compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("output", metavar="OUTPUT", help="directory to write, new or begun by the same command")
    add_config(parser)
    add_settings(parser, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings, SourceSettings)
    parser.add_argument("--text", help="then evaluate on this text, named as in `swsc evaluate`")
    parser.add_argument("--push", metavar="REPO_ID", help="at the end, push the output to the Hub, as `swsc push` does")
    parser.add_argument("--private", action="store_true", help="with --push: as in `swsc push`")
    for flag in ("--seqlen", "--windows"):
        parser.add_argument(flag, default=argparse.SUPPRESS, help="with --text: as in `swsc evaluate`")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF file")
    parser.add_argument("output", metavar="OUTPUT", help="new directory, on this machine")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default=DTYPE,
        help="of the weights (default: %(default)s)",
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="directory that compress or restore has written")
    add_settings(parser, ClusterSettings)


def _restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="directory of a compressed model")
    parser.add_argument("dense", metavar="DENSE", help="directory to write")
    add_settings(parser, ClusterSettings)
    parser.add_argument(
        "--adapter",
        action="store_true",
        help=f"leave the low-rank part to a LoRA adapter, which stock PEFT opens at DENSE/{ADAPTER}",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model brings, where --adapter needs it"
    )
    parser.add_argument("--verify", action="store_true", help="first hash OUTPUT's files, as `swsc verify` does")
    parser.add_argument("--overwrite", action="store_true", help="replace another output, or a damaged one")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="directory of a dense, compressed or restored model, a GGUF file or a Hub id"
    )
    add_settings(parser, EvaluateSettings, TaskSettings, ClusterSettings, SourceSettings)
    parser.add_argument("--verify", action="store_true", help="first hash an output's files, as `swsc verify` does")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    parser.add_argument("--card", action="store_true", help="also write it into the model card of a local output")
    parser.add_argument(
        "--uncompressed",
        metavar="FILE",
        help="with --card: what --json wrote of the uncompressed model, to stand beside it",
    )


def _push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="directory that compress or restore has written")
    parser.add_argument("repo", metavar="REPO_ID", help="model on the Hub, as ORG/NAME; made if it is not there")
    add_settings(parser, PushSettings, ClusterSettings)


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the sweep; configs/ has examples")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory of the results")
    parser.add_argument("--model", action="append", default=[], help="a model, in place of the file's; may be repeated")
    parser.add_argument("--text", help="the text of every evaluation, in place of the file's")
    for flag in ("--text-column", "--seqlen", "--windows", "--dtype"):
        parser.add_argument(flag, help="of every evaluation, in place of the file's")
    parser.add_argument("--calibration", help="the calibration text, in place of the file's")
    parser.add_argument("--keep-tuned", action="store_true", help=SweepSettings.model_fields["keep_tuned"].description)
    add_settings(parser, LoadSettings, ClusterSettings)


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _demo,
    "plan": _plan,
    "compress": _compress,
    "convert": _convert,
    "verify": _verify,
    "restore": _restore,
    "evaluate": _evaluate,
    "push": _push,
    "sweep": _sweep,
}
