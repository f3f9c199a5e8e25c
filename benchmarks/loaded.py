"""Claim: the parameters of a compressed model take no more memory than its files; also times a forward pass.

    python -m benchmarks.loaded DENSE COMPRESSED [COMPRESSED …]

transformers opens each model in its own process, in the dtype of its files. Memory is the growth of the process (RSS)
from the import of the libraries to the end of a forward pass over the prompt, including activations and cache. Times
are medians of five, given as ratios to the dense model of the same run.

Good result, exit code 0: the parameters of no model take more bytes than its files.
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

# Tokens of the prompt.
_PROMPT = 256
_REPEATS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="the dense one first")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure(given.alone)))
        return 0
    results = [
        json.loads(subprocess.run(command(model), stdout=subprocess.PIPE, check=True).stdout) for model in given.models
    ]
    dense = results[0]
    header = ("model", "files, MB", "parameters, MB", "memory, MB")
    rows = [
        (
            model.name,
            *(result[key] / 1e6 for key in ("files", "parameters", "memory")),
            *(result[key] / dense[key] for key in ("memory", "prompt", "token")),
        )
        for model, result in zip(given.models, results, strict=True)
    ]
    print_markdown((*header, "ratio to dense", "prompt, ratio of time", "one token, ratio"), rows)
    return 1 if any(result["parameters"] > result["files"] for result in results) else 0


def command(model: Path) -> list[str]:
    """Command that measures one model with this script."""
    return [sys.executable, "-m", "benchmarks.loaded", "--alone", str(model)]


def measure(directory: Path) -> dict[str, float]:
    """Bytes and seconds of one model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import swsc_core.hf  # noqa: F401

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(directory)
    # importing its code before is not counted as memory of the model
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    before = resident()
    model = kind.from_pretrained(directory, dtype="auto")
    parameters = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.numel()}
    prompt = torch.randint(0, config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
        memory = resident() - before
        return {
            "files": sum(tensor_bytes(file) for file in directory.glob("*.safetensors")),
            "parameters": sum(parameters.values()),
            "memory": memory,
            "prompt": median(lambda: model(prompt, use_cache=False)),
            "token": median(lambda: model(prompt[:, :1], past_key_values=cache, use_cache=True)),
        }


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors of a safetensors file."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def resident() -> int:
    """RSS of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median(call: Callable[[], Any]) -> float:
    """Median seconds of several calls."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
