"""Shared part of the quantizing scripts: arguments, tensors of a checkpoint, the dense checkpoint and `peer.json`.

This module runs in the environment of each tool and therefore needs only torch and safetensors. A script defines a
function from a request and the shapes of the selected matrices to an `Outcome`; `run` does the rest. Times and memory
are those of the function, so that the imports of the tool, at the top of its script, are not counted.
"""

import argparse
import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from swsc_core.storage.json_fields import JsonObject

Shapes = dict[str, tuple[int, ...]]
# All tools store scales in float16 or bfloat16.
SCALE_BYTES = 2
# Values of --group-size that are not a number of weights.
WHOLE_TENSOR, CHANNEL = 0, -1


class Refusal(Exception):
    """The tool does not support the request; the message is a reason of one line."""


@dataclass(frozen=True)
class Outcome:
    """Result of a tool.

    Attributes:
        tool, version, settings: shown beside the figures; `settings["bits"]` is the width of a code.
        weights: restored matrices by tensor name; they are written in the dtype of the checkpoint.
        stored: bytes of each matrix in the tool's format.
    """

    tool: str
    version: str
    settings: "JsonObject"
    weights: dict[str, Tensor]
    stored: dict[str, int]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser with the flags that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a safetensors checkpoint")
    parser.add_argument("output", type=Path, help="directory for model/ and peer.json")
    parser.add_argument("--calibration", help="tokens, .npy int64 [windows, seqlen]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument(
        "--group-size", type=int, required=True, help="weights per scale; -1: a row, 0: the whole matrix"
    )
    parser.add_argument("--include", required=True, help="regular expression of tensor names")
    return parser


def run(parser: argparse.ArgumentParser, quantize: Callable[[argparse.Namespace, Shapes], Outcome]) -> int:
    """Parse, quantize, write. Returns 2 if the tool refuses; the last line of stderr is then the reason."""
    request = parser.parse_args()
    try:
        shapes = selected(request.model, request.include)
        wall, cpu = time.perf_counter(), cpu_seconds()
        outcome = quantize(request, shapes)
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu, "peak_rss": peak_rss()}
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    write_dense(request.model, request.output / "model", outcome.weights)
    report = {**description(outcome, shapes), **cost, "threads": torch.get_num_threads()}
    partial = request.output / "peer.json.part"
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(request.output / "peer.json")
    return 0


class Description(TypedDict):
    """The part of `peer.json` that describes the result; true bits are those of the selected matrices."""

    tool: str
    version: str
    settings: "JsonObject"
    weights: int
    stored_bytes: dict[str, int]
    bits_per_weight: float


def description(outcome: Outcome, shapes: Shapes) -> Description:
    """Describe the result of a tool for the selected matrices."""
    weights = sum(rows * columns for rows, columns in shapes.values())
    return {
        "tool": outcome.tool,
        "version": outcome.version,
        "settings": outcome.settings,
        "weights": weights,
        "stored_bytes": outcome.stored,
        "bits_per_weight": 8 * sum(outcome.stored.values()) / weights,
    }


def shards(model: str) -> list[Path]:
    return sorted(Path(model).glob("*.safetensors"))


def selected(model: str, include: str) -> Shapes:
    """Shapes of the matrices whose names match `include`. Raises Refusal if there are none."""
    shapes: Shapes = {}
    for shard in shards(model):
        with safe_open(shard, "pt") as file:
            names = [name for name in file.keys() if re.search(include, name)]  # noqa: SIM118 - not a mapping
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    if not shapes:
        raise Refusal(f"{model}: no matrix has a name that matches {include!r}")
    return shapes


def tensors(model: str, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """The selected matrices, one at a time."""
    for shard in shards(model):
        with safe_open(shard, "pt") as file:
            for name in shapes.keys() & set(file.keys()):
                yield name, file.get_tensor(name)


def write_dense(model: str, target: Path, weights: dict[str, Tensor]) -> None:
    """Write the checkpoint with `weights` in place of its matrices, in its shards and dtypes; copy other files."""
    target.mkdir(parents=True, exist_ok=True)
    for path in Path(model).iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".gguf"):
            shutil.copyfile(path, target / path.name)
    for shard in shards(model):
        tensors = load_file(shard)
        replaced = tensors.keys() & weights.keys()
        tensors |= {name: weights[name].to(tensors[name].dtype).contiguous() for name in replaced}
        save_file(tensors, target / shard.name, metadata={"format": "pt"})


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss() -> int:
    """Peak resident memory of this process in bytes.

    On Linux, ru_maxrss is inherited from the parent through fork and exec, so VmHWM is read where it exists.
    """
    with suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
