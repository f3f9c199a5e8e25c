"""Claim: `swsc plan` reads only headers, in less than 60 s and 1 GB, also for 70B and 671B models.

    python -m benchmarks.plan DIR

Writes both checkpoints below DIR as sparse files (a few MB of disk), plans them, and prints a table.

Good result, exit code 0: both plans stay within the limits.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import print_markdown
from benchmarks.headers import deepseek_671b, llama_70b, make

ROOT = Path(__file__).parents[1]
SECONDS, PEAK_BYTES = 60.0, 1e9


def planned(folder: Path) -> tuple[float, int, str]:
    """Seconds and peak memory of `swsc plan`, and the line of its output that estimates the output size."""
    command = [
        sys.executable,
        "-m",
        "jobs",
        "plan",
        str(folder),
        "--include",
        "_proj",
        "--preset",
        "best",
        "--bits",
        "2.25",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.startswith("output_bytes")]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"plan of {folder} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, lines[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows, within_limits = [], True
    for name, (config, shapes) in {"Llama-3-70B": llama_70b(), "DeepSeek-V3 671B": deepseek_671b()}.items():
        make(folder / name.split()[0], config, shapes)
        seconds, peak, output = planned(folder / name.split()[0])
        within_limits &= seconds < SECONDS and peak < PEAK_BYTES
        rows.append([name, len(shapes), seconds, peak / 1e9, output])
    print_markdown(["shape of", "tensors", "seconds", "peak memory, GB", "estimated output"], rows)
    print("within the limits" if within_limits else "LIMITS EXCEEDED")
    raise SystemExit(not within_limits)


if __name__ == "__main__":
    main()
