"""Claim: a model in blocks of layers has the same losses, its workers stay below the cap, and it takes little longer.

    python -m benchmarks.blocks evaluate MODEL TEXT --cap 1.1        caps in GiB; workers 1, 2 and 3

Each run is a command on its own Ray cluster, whose processes are sampled (watch.py). The first one has no cap and one
worker. Seconds are those of the evaluation itself, without the start of Ray.

Good result, exit code 0: equal losses, and no worker above the cap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.common import print_markdown
from benchmarks.watch import Watch

ROOT = Path(__file__).parents[1]
# Seconds between samples, and the number of samples after which one is thorough.
INTERVAL, THOROUGH = 0.2, 5


@dataclass(frozen=True)
class Measured:
    """One run: the losses of its windows, its seconds, and the largest resident memory of a worker in bytes."""

    losses: list[float]
    seconds: float
    peak: int


def measure(model: str, text: str, windows: int, seqlen: int, flags: list[str]) -> Measured:
    """Evaluate in another process, and sample it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "jobs", "evaluate", model, "--text", text, "--seqlen", str(seqlen)]
        command += ["--windows", str(windows), "--json", str(result), "--address", "local", *flags]
        driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
        watch, samples = Watch(psutil.Process(driver.pid)), 0
        while driver.poll() is None:
            watch.sample(thorough=samples % THOROUGH == 0)
            samples += 1
            time.sleep(INTERVAL)
        if driver.returncode:
            raise SystemExit(driver.returncode)
        found = json.loads(result.read_text())
    return Measured(found["nll_per_window"], found["seconds"], watch.peaks["ray::ActorWorker"]["rss"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["evaluate"])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--cap", type=float, required=True, help="GiB")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    runs: dict[str, list[str]] = {"whole model, 1 worker": ["--workers", "1"]}
    for workers in (1, 2, 3):
        flags = ["--workers", str(workers), "--cpus-per-worker", "0.5", "--memory-per-worker", str(given.cap)]
        runs[f"blocks, {workers} worker{'s' if workers > 1 else ''}"] = flags
    found = {name: measure(given.model, given.text, given.windows, given.seqlen, runs[name]) for name in runs}
    whole = next(iter(found.values()))
    rows = [
        (name, each.losses == whole.losses, f"{each.seconds / whole.seconds:.2f}", f"{each.peak / 2**30:.2f}")
        for name, each in found.items()
    ]
    print_markdown(("run", "equal losses", "time, relative", "peak of a worker, GiB"), rows)
    capped = [each for name, each in found.items() if name.startswith("blocks")]
    return 0 if all(each.losses == whole.losses and each.peak <= given.cap * 2**30 for each in capped) else 1


if __name__ == "__main__":
    sys.exit(main())
