"""Claim: two `swsc` commands run on one machine at the same time, each with its own Ray, without waiting.

    python -m benchmarks.two_commands [--rounds 10] [--text-words 400000]

Starts a first command, waits until its Ray runs, starts a second one and measures the time to its first line of output.
In every other round both start at the same time. The time of the second command alone is the reference.

Good result, exit code 0: in every round the first line comes at most 15 s later than alone, the exit code is 0, and the
first command is still running.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.common import print_markdown
from tests.support.tiny import make_text, make_tiny_model

# Seconds that the first line of the second command may come later than alone.
MAX_DELAY = 15.0


@dataclass(frozen=True)
class Run:
    """Seconds from the start of a command to its first line and to its end, and its exit code."""

    first_line: float
    end: float
    code: int


def command(*argv: object) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, argv)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def timed_run(*argv: object) -> Run:
    """Run a command to its end."""
    started = time.monotonic()
    with command(*argv) as process:
        assert process.stdout
        process.stdout.readline()
        first = time.monotonic() - started
        process.stdout.read()
    return Run(first, time.monotonic() - started, process.returncode)


@contextlib.contextmanager
def running(wait_for_ray: bool, *argv: object) -> Iterator["subprocess.Popen[str]"]:
    """A running command, optionally from when its Ray runs. It is terminated with the context."""
    process = command(*argv)
    try:
        while wait_for_ray and not _has_ray(process.pid):
            if process.poll() is not None:
                raise RuntimeError(
                    f"the first command ended before it was measured: {process.stdout.read() if process.stdout else ''}"
                )
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait()


def _has_ray(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(child.name() == "raylet" for child in psutil.Process(pid).children(recursive=True))
    return False


def measure(folder: Path, rounds: int, words: int) -> tuple[Run, list[tuple[str, Run, bool]]]:
    """The second command alone, and for each round its start, its run and whether the first command kept running."""
    model = make_tiny_model(folder / "model")
    text = make_text(folder / "text.txt", words)
    output = folder / "out"
    assert timed_run("compress", model, output, "--local", "--projectors", "q", "--bits", "4").code == 0
    first, second = ("evaluate", model, "--text", text, "--seqlen", "64"), ("verify", output)
    alone, results = timed_run(*second), []
    for number in range(rounds):
        together = number % 2 == 1
        with running(not together, *first) as first_command:
            run = timed_run(*second)
            results.append(("together" if together else "after", run, first_command.poll() is None))
        print(f"round {number + 1}: {run}, alone {alone}", file=sys.stderr, flush=True)
    return alone, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--text-words", type=int, default=400_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, results = measure(Path(folder), arguments.rounds, arguments.text_words)
    rows = [("alone", alone.first_line, alone.end, alone.code, "")]
    rows += [
        (start, run.first_line, run.end, run.code, "running" if alive else "ended") for start, run, alive in results
    ]
    print_markdown(("second command", "s to its first line", "s to its end", "exit code", "first command"), rows)
    late = [run for _, run, alive in results if run.code or run.first_line > alone.first_line + MAX_DELAY or not alive]
    print(f"{len(results) - len(late)} of {len(results)} within {MAX_DELAY:.0f} s of the time alone, with both running")
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
