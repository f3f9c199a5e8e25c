"""Experiment: what a compressed model takes in vLLM, in memory and in time, against the dense one of the same run.

    python -m benchmarks.serving DENSE COMPRESSED [COMPRESSED …]

Each model is opened by vLLM in a process of its own, eager, on one thread, in bfloat16 unless --dtype says otherwise; all are
held open and asked in turn, round after round. Memory is what its process has grown by (RSS) from the import of vLLM to the end of a
round, cache and activations included; vLLM packs dense weights into a form of its own, so there are no parameters to count. Times
are CPU seconds, which other load changes little: of a prompt of 256 tokens to its first token, and of a token after the first, of one
sequence and of eight at once. Medians over the rounds, as ratios to the first model.
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
_BLOCKS = 40  # of the cache: as many as eight sequences need, and some


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
    held = [answer(process) for process in processes]
    rounds = [[ask(process) for process in processes] for _ in range(given.rounds)]
    for process in processes:
        process.communicate("")
    print_markdown(
        ("model", "memory, MB", "of the dense one's", "prompt, ratio of time", "one token, ratio", "eight at once, ratio"),
        [
            (
                model.name, held[place]["held"] / 1e6, held[place]["held"] / held[0]["held"],
                *(ratio([one[place][kind] / one[0][kind] for one in rounds]) for kind in ("prompt", "token", "together")),
            )
            for place, model in enumerate(given.models)
        ],
    )  # fmt: skip
    return 0


def ratio(found: list[float]) -> str:
    """Median of the rounds, and their range."""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def start(given: argparse.Namespace, model: Path) -> "subprocess.Popen[str]":
    """This script again, for one model."""
    flags = ["--alone", str(model), "--dtype", given.dtype]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: "subprocess.Popen[str]") -> dict[str, float]:
    """One round of one model: seconds."""
    assert process.stdin is not None
    process.stdin.write("round\n")
    process.stdin.flush()
    return answer(process)


def answer(process: "subprocess.Popen[str]") -> dict[str, float]:
    """The next line that is an answer; vLLM logs on the same stream."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("answer "):
            return dict(json.loads(line.removeprefix("answer ")))
    raise SystemExit(f"{process.args!r} ended without an answer; what it said stands above")


def serve(given: argparse.Namespace) -> int:
    """Open the model, say what it holds, and time a round for each line that comes."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch
    from vllm import LLM

    torch.set_num_threads(1)
    before = resident()
    llm = LLM(
        str(given.alone), dtype=given.dtype, max_model_len=512, max_num_seqs=_TOGETHER, enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=True, num_gpu_blocks_override=_BLOCKS,
    )  # fmt: skip
    timed_round(llm)  # the first has things to set up
    print("answer", json.dumps({"held": resident() - before}), flush=True)
    for _ in sys.stdin:
        print("answer", json.dumps(timed_round(llm)), flush=True)
    return 0


def timed_round(llm: Any) -> dict[str, float]:
    """CPU seconds of a prompt, of a token after it, and of a token of several sequences at once."""
    first, one = seconds(llm, 1, 1), seconds(llm, 1, 1 + _TOKENS)
    firsts, several = seconds(llm, _TOGETHER, 1), seconds(llm, _TOGETHER, 1 + _TOKENS)
    return {"prompt": first, "token": (one - first) / _TOKENS, "together": (several - firsts) / _TOKENS}


def seconds(llm: Any, sequences: int, tokens: int) -> float:
    """CPU seconds to answer so many prompts at once with so many tokens each."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * place + number) % 1000 for place in range(_PROMPT)]} for number in range(sequences)
    ]
    started = time.process_time()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
