"""Claims: `swsc plan` predicts the memory of workers within a factor of 1.3, and plans large models by their headers.

    python -m benchmarks.memory_plans --base           a worker that holds no weights
    python -m benchmarks.memory_plans --measure DIR    predictions and measured peaks (VmHWM) of a random Llama of 1 GB
    python -m benchmarks.memory_plans --plans DIR      plans of four large models on 8 GPUs of 80 GB and on one of 24

The files of DIR are made once. Those of the large models are sparse and take a few MB of disk.

Good result, exit code 0: the base is at most what pipeline/planning/memory.py assumes, each measured peak is between
the prediction divided by 1.3 and the prediction times 1.1, and each plan takes less than 90 s.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import print_markdown
from benchmarks.headers import deepseek_671b, llama_7b, llama_70b, make, mixtral_8x22b

_ROOT = Path(__file__).parents[1]
_HARDWARE = {
    "8 × 80 GB": ("--workers", "8", "--gpus-per-worker", "1", "--memory-per-worker", str(80e9 / 2**30)),
    "1 × 24 GB": ("--workers", "1", "--gpus-per-worker", "1", "--memory-per-worker", str(24e9 / 2**30)),
}
_PLAN_SECONDS = 90.0
_OVER, _UNDER = 1.3, 1.1
_BEST = ("--preset", "best", "--bits", "2.25", "--include", "layers.0.*_proj", "--calibration-windows", "8")
_LOCAL = ("--local", "--gpus-per-worker", "0")


def run(*arguments: str) -> int:
    """Run a verb in a process of its own, and return its peak resident memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "jobs", *arguments], cwd=_ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return usage.ru_maxrss * 1024


def plan(model: Path, *flags: str) -> list[dict[str, Any]]:
    """The stages of a plan."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        run("plan", str(model), *flags, "--json", str(file))
        stages: list[dict[str, Any]] = json.loads(file.read_text())["stages"]
    return stages


def make_llama(folder: Path) -> None:
    """Write a random Llama of 254 million weights with a tokenizer, and a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import make_text, save_tokenizer

    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "vocab_size": 32000,
    }
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=512)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "llama", max_shard_size="200MB")
    save_tokenizer(folder / "llama")
    make_text(folder / "text.txt", 8000)


def evaluated(folder: Path, *cap: str) -> tuple[str, int, int]:
    """How an evaluation runs, its predicted peak, and the measured one."""
    model, text = str(folder / "llama"), str(folder / "text.txt")
    (stage,) = (stage for stage in plan(folder / "llama", *_BEST, *_LOCAL, *cap) if stage["stage"] == "evaluate")
    peak = run("evaluate", model, "--text", text, "--seqlen", "512", "--windows", "5", *_LOCAL, *cap)
    return f"evaluate, {stage['way']}", stage["host_bytes"], peak


def compressed(folder: Path, name: str, *flags: str) -> tuple[str, int, int]:
    """A compression: the largest predicted peak of its stages, and the measured one."""
    stages = plan(folder / "llama", *_BEST, *_LOCAL, *flags)
    predicted = max(stage["host_bytes"] for stage in stages if stage["stage"] in ("calibrate", "compress", "tune"))
    with tempfile.TemporaryDirectory() as output:
        calibration = ("--calibration", str(folder / "text.txt"))
        peak = run("compress", str(folder / "llama"), f"{output}/out", *_BEST, *calibration, *_LOCAL, *flags)
    return name, predicted, peak


def measure(folder: Path) -> bool:
    """Print predictions and measured peaks."""
    if not (folder / "text.txt").exists():
        make_llama(folder)
    rows = [
        evaluated(folder),
        evaluated(folder, "--memory-per-worker", "1.5"),
        evaluated(folder, "--memory-per-worker", "1.0"),
        compressed(folder, "calibrate", "--tune", "0"),
        compressed(folder, "tune", "--tune", "1"),
    ]
    header = ("stage", "predicted GB", "measured GB", "predicted / measured")
    print_markdown(header, [(name, a / 1e9, b / 1e9, a / b) for name, a, b in rows])
    return all(b / _UNDER <= a <= _OVER * b for _, a, b in rows)


def base() -> bool:
    """Print the peak of a Ray worker that imported transformers and built a model class."""
    import ray

    from pipeline.planning.memory import WORKER_BASE

    def peak() -> int:
        from transformers import AutoModelForCausalLM, LlamaConfig

        import pipeline.calibration.job
        import pipeline.tuning.job  # noqa: F401
        from pipeline.engine.malloc import peak_rss

        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4))
        return peak_rss()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    measured: int = ray.get(ray.remote(peak).remote())
    ray.shutdown()
    print(f"a worker without weights: {measured / 1e6:.0f} MB; assumed: {WORKER_BASE.cpu / 1e6:.0f} MB")
    return measured <= WORKER_BASE.cpu


def plans(folder: Path) -> bool:
    """Print the plans of the large models."""
    models = {
        "Llama-2-7B": llama_7b(),
        "Llama-3-70B": llama_70b(),
        "Mixtral-8x22B": mixtral_8x22b(),
        "DeepSeek-V3": deepseek_671b(),
    }
    rows, slowest = [], 0.0
    for name, (config, shapes) in models.items():
        make(folder / name, config, shapes)
        for hardware, flags in _HARDWARE.items():
            started = time.perf_counter()
            stages = plan(folder / name, "--preset", "best", "--bits", "2.25", "--include", "_proj|experts", *flags)
            slowest = max(slowest, time.perf_counter() - started)
            rows += [(name, hardware, *cells(stage)) for stage in stages]
    header = ("model", "GPUs", "stage", "a worker holds", "workers", "host GB", "GPU GB", "read GB", "hidden GB")
    print_markdown(header, rows)
    print(f"the slowest plan took {slowest:.0f} s")
    return slowest < _PLAN_SECONDS


def cells(stage: dict[str, Any]) -> tuple[object, ...]:
    """A stage as cells of a table."""
    figures = (stage[key] / 1e9 for key in ("host_bytes", "device_bytes", "read_bytes", "hidden_bytes"))
    way = stage["way"] if stage["is_possible"] else stage["way"].split(";")[0]
    return stage["stage"], way, stage["workers"], *(round(figure, 1) for figure in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--measure", type=Path, metavar="DIR")
    parser.add_argument("--plans", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    good = base() if arguments.base else True
    good &= measure(arguments.measure) if arguments.measure else True
    good &= plans(arguments.plans) if arguments.plans else True
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
