"""The command line of the benchmark. A mistake gives one line on standard error."""

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.peers.rows import DEFAULT, PEERS
from benchmarks.peers.script import CHANNEL

# Every matrix of a numbered layer.
LINEAR_OF_LAYERS = r"\.\d+\..*\.weight$"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def parse(description: str | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.peers", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory of a dense safetensors checkpoint")
    parser.add_argument("--text", required=True, help="text that perplexity is measured on, as for `swsc evaluate`")
    parser.add_argument(
        "--calibration",
        required=True,
        help="calibration text, as for `swsc compress`; must not contain the text of --text",
    )
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-seqlen", type=int, default=512)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="first N windows only (default: all)")
    parser.add_argument("--dtype", default="float32", help="dtype of the evaluation, as for `swsc evaluate`")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows, results.json and environments")
    parser.add_argument(
        "--environments", type=Path, help="folder in which the tools are installed (default: OUT/environments)"
    )
    parser.add_argument("--peers", type=peers, default=list(DEFAULT), help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--bits", type=numbers, default=[3, 2], help="widths of a code (default: 3,2)")
    parser.add_argument(
        "--group-sizes", type=groups, default=[64, 128], help="weights per scale, or channel (default: 64,128)"
    )
    parser.add_argument(
        "--include",
        type=regex,
        default=LINEAR_OF_LAYERS,
        help="regular expression of tensor names (default: all linear layers)",
    )
    parser.add_argument("--name", default="all linear", help="name of these tensors in the table")
    parser.add_argument(
        "--autoround-iters", type=int, default=200, help="iterations of AutoRound (its best recipe: 1000)"
    )
    parser.add_argument("--workers", type=int, help="number of Ray workers of the evaluation (default: one process)")
    parser.add_argument("--keep", action="store_true", help="keep the dense checkpoints")
    return parser.parse_args()


def peers(value: str) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    return names


def numbers(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def groups(value: str) -> list[int]:
    sizes = [CHANNEL if part == "channel" else int(part) for part in value.split(",")]
    if any(size < 1 and size != CHANNEL for size in sizes):
        raise argparse.ArgumentTypeError("a group has at least one weight")
    return sizes


def regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    return value
