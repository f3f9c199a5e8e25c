"""What the quantizing scripts share: arguments, the tensors of a checkpoint, the dense checkpoint and `peer.json`.

It runs in the environment of each tool, so it needs torch and safetensors alone. A script is a function from a request and
the names of the selected matrices to an Outcome; `run` does the rest. Clock and memory are those of the function: the
tool's imports stand at the top of its script and are not counted.
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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
SCALE_BYTES = 2  # every tool's scales are stored in float16 or bfloat16
WHOLE_TENSOR, CHANNEL = 0, -1  # group sizes that are no number of weights


class Refusal(Exception):
    """The tool cannot do what is asked; one line that says why."""


@dataclass(frozen=True)
class Outcome:
    """What a tool made.

    Attributes:
        tool, version, settings: what is said beside the figures; `settings["bits"]` is the width of a code.
        weights: restored matrices by tensor name; the checkpoint's own dtype is taken when they are written.
        stored: bytes of each matrix in the tool's format.
    """

    tool: str
    version: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    stored: dict[str, int]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that every script knows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a safetensors checkpoint")
    parser.add_argument("output", type=Path, help="directory to make: model/ and, last of all, peer.json")
    parser.add_argument("--calibration", help="tokens, .npy int64 [windows, seqlen]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True, help="weights a scale; -1: a row, 0: the whole matrix")
    parser.add_argument("--include", required=True, help="regular expression of tensor names")
    return parser


def run(parser: argparse.ArgumentParser, quantize: Callable[[argparse.Namespace, Shapes], Outcome]) -> int:
    """Parse, quantize, write; 2 if the tool refuses, in which case the last line of stderr says why."""
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


def description(outcome: Outcome, shapes: Shapes) -> dict[str, Any]:
    """The part of `peer.json` that says what was made; true bits are those of the selected matrices."""
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
    """Shapes of the matrices whose tensor names the expression finds; Refusal if there are none."""
    shapes: Shapes = {}
    for shard in shards(model):
        with safe_open(shard, "pt") as file:
            names = [name for name in file.keys() if re.search(include, name)]  # noqa: SIM118 - it is no mapping
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    if not shapes:
        raise Refusal(f"{model}: no matrix has a name that {include!r} finds")
    return shapes


def tensors(model: str, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """The selected matrices, one at a time."""
    for shard in shards(model):
        with safe_open(shard, "pt") as file:
            for name in shapes.keys() & set(file.keys()):
                yield name, file.get_tensor(name)


def write_dense(model: str, target: Path, weights: dict[str, Tensor]) -> None:
    """The checkpoint with `weights` in place of its own, in its own shards and dtypes; all else is copied as it is."""
    target.mkdir(parents=True, exist_ok=True)
    for path in Path(model).iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".gguf"):
            shutil.copyfile(path, target / path.name)
    for shard in shards(model):
        held = load_file(shard)
        held |= {name: weights[name].to(held[name].dtype).contiguous() for name in held.keys() & weights.keys()}
        save_file(held, target / shard.name, metadata={"format": "pt"})


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss() -> int:
    """Largest resident size of this process in bytes.

    Linux hands ru_maxrss down from the parent through fork and exec, so the kernel's own mark is read where there is one.
    """
    with suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
