"""Claim: a compressed model is as small in memory as on disk; and what a forward pass from the parts costs in time.

    python -m benchmarks.loaded DENSE COMPRESSED [COMPRESSED …]

Each model is opened by transformers in a process of its own, in the dtype of its files. Memory is what its process has
grown by (RSS) from the import of the libraries to the end of a forward pass over the prompt, activations and cache included; times are medians of five, given as ratios to the dense model of
the same run. Exits 1 if the parameters take more than what the files hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import print_markdown

_PROMPT = 256  # tokens
_REPEATS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="the dense one first")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(look(given.alone)))
        return 0
    found = [
        json.loads(subprocess.run(command(model), stdout=subprocess.PIPE, check=True).stdout) for model in given.models
    ]
    dense = found[0]
    print_markdown(
        ("model", "files, MB", "parameters, MB", "memory, MB", "of the dense one's", "prompt, ratio of time", "one token, ratio"),
        [
            (
                model.name, one["files"] / 1e6, one["parameters"] / 1e6, one["memory"] / 1e6, one["memory"] / dense["memory"],
                one["prompt"] / dense["prompt"], one["token"] / dense["token"],
            )
            for model, one in zip(given.models, found, strict=True)
        ],
    )  # fmt: skip
    return 1 if any(one["parameters"] > one["files"] for one in found) else 0


def command(model: Path) -> list[str]:
    """This script again, for one model."""
    return [sys.executable, "-m", "benchmarks.loaded", "--alone", str(model)]


def look(directory: Path) -> dict[str, float]:
    """What one model takes: bytes and seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import swsc_core.hf  # noqa: F401

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(directory)
    kind = AutoModelForCausalLM._model_mapping[type(config)]  # its code is no part of the model's memory
    before = resident()
    model = kind.from_pretrained(directory, dtype="auto")
    held = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.numel()}
    prompt = torch.randint(0, config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
        memory = resident() - before
        return {
            "files": sum(tensor_bytes(file) for file in directory.glob("*.safetensors")),
            "parameters": sum(held.values()),
            "memory": memory,
            "prompt": median(lambda: model(prompt, use_cache=False)),
            "token": median(lambda: model(prompt[:, :1], past_key_values=cache, use_cache=True)),
        }


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors of a safetensors file."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def resident() -> int:
    """RSS of this process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median(call: Callable[[], Any]) -> float:
    """Median seconds of some calls."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
