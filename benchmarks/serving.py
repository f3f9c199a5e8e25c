"""Experiment: memory and time of a compressed model in vLLM, relative to the dense model of the same run.

    python -m benchmarks.serving DENSE COMPRESSED [COMPRESSED …]

vLLM opens each model in its own process, eager, with one thread, in bfloat16 unless --dtype is given. All models stay
open and answer in turn, round after round. Memory is the growth of the process (RSS) from the import of vLLM to the end
of a round, including cache and activations; vLLM packs dense weights into its own format, so parameters cannot be
counted. Times are CPU seconds, which depend little on other load: of a prompt of 256 tokens up to its first token, and
per token after the first, for one sequence and for eight at once. Figures are medians over the rounds, as ratios to the
first model.

A good result has ratios of memory below 1, and ratios of time as close to 1 as possible; there is no limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import print_markdown
from benchmarks.loaded import resident

_PROMPT, _TOKENS, _TOGETHER = 256, 16, 8
# Blocks of the cache: more than eight sequences need.
_BLOCKS = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="the dense one first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        return serve(given)
    processes = [start(given, model) for model in given.models]
    memory = [answer(process)["memory"] for process in processes]
    rounds = [[ask(process) for process in processes] for _ in range(given.rounds)]
    for process in processes:
        process.communicate("")
    header = (
        "model",
        "memory, MB",
        "ratio to dense",
        "prompt, ratio of time",
        "one token, ratio",
        "eight at once, ratio",
    )
    kinds = ("prompt", "token", "together")
    rows = [
        (
            model.name,
            memory[index] / 1e6,
            memory[index] / memory[0],
            *(ratio([times[index][kind] / times[0][kind] for times in rounds]) for kind in kinds),
        )
        for index, model in enumerate(given.models)
    ]
    print_markdown(header, rows)
    return 0


def ratio(ratios: list[float]) -> str:
    """Median of the rounds, and their range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def start(given: argparse.Namespace, model: Path) -> "subprocess.Popen[str]":
    """Start this script for one model."""
    flags = ["--alone", str(model), "--dtype", given.dtype]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Seconds of one round of one model."""
    assert process.stdin is not None
    process.stdin.write("round\n")
    process.stdin.flush()
    return answer(process)


def answer(process: "subprocess.Popen[str]") -> dict[str, float]:
    """The next answer. Other lines are skipped, because vLLM logs to the same stream."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("answer "):
            return dict(json.loads(line.removeprefix("answer ")))
    raise SystemExit(f"{process.args!r} ended without an answer; see its output above")


def serve(given: argparse.Namespace) -> int:
    """Open the model, print its memory, and time one round for each line of standard input."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    import torch
    from vllm import LLM

    torch.set_num_threads(1)
    before = resident()
    llm = LLM(
        str(given.alone),
        dtype=given.dtype,
        max_model_len=512,
        max_num_seqs=_TOGETHER,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        num_gpu_blocks_override=_BLOCKS,
    )
    timed_round(llm)  # the first round includes set-up
    print("answer", json.dumps({"memory": resident() - before}), flush=True)
    for _ in sys.stdin:
        print("answer", json.dumps(timed_round(llm)), flush=True)
    return 0


def timed_round(llm: Any) -> dict[str, float]:
    """CPU seconds of a prompt, of a token after it, and of a token of each of several sequences."""
    first, single = seconds(llm, 1, 1), seconds(llm, 1, 1 + _TOKENS)
    firsts, several = seconds(llm, _TOGETHER, 1), seconds(llm, _TOGETHER, 1 + _TOKENS)
    return {"prompt": first, "token": (single - first) / _TOKENS, "together": (several - firsts) / _TOKENS}


def seconds(llm: Any, sequences: int, tokens: int) -> float:
    """CPU seconds to answer `sequences` prompts at once with `tokens` tokens each."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * position + number) % 1000 for position in range(_PROMPT)]}
        for number in range(sequences)
    ]
    started = time.process_time()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
