"""Claim: two `swsc` commands at once on one machine start at once, each with a Ray of its own, and neither waits for the other.

A first command is at work with its own Ray; a second one begins and its first line of output is waited for. Beside it stands the same
command alone: its own start-up time. Every other round both begin at the same moment.

    python -m benchmarks.two_commands [--rounds 10] [--text-words 400000]
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

LONGER = 15.0  # seconds that the second one's first output may come later than when it is alone


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
    """A command until it ends."""
    started = time.monotonic()
    with command(*argv) as process:
        assert process.stdout
        process.stdout.readline()
        first = time.monotonic() - started
        process.stdout.read()
    return Run(first, time.monotonic() - started, process.returncode)


@contextlib.contextmanager
def at_work(wait_for_ray: bool, *argv: object) -> Iterator["subprocess.Popen[str]"]:
    """A command under way, from when its Ray is up; it is ended with the context."""
    process = command(*argv)
    try:
        while wait_for_ray and not _has_ray(process.pid):
            if process.poll() is not None:
                raise RuntimeError(f"the first command has ended: {process.stdout.read() if process.stdout else ''}")
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
    """The second command alone; then of each round: how it began, what it took, and whether the first was alive all the while."""
    model = make_tiny_model(folder / "model")
    text = make_text(folder / "text.txt", words)
    output = folder / "out"
    assert timed_run("compress", model, output, "--local", "--projectors", "q", "--bits", "4").code == 0
    first, second = ("evaluate", model, "--text", text, "--seqlen", "64"), ("verify", output)
    alone, found = timed_run(*second), []
    for number in range(rounds):
        together = number % 2 == 1
        with at_work(not together, *first) as other:
            run = timed_run(*second)
            found.append(("together" if together else "after", run, other.poll() is None))
        print(f"round {number + 1}: {run}, alone {alone}", file=sys.stderr, flush=True)
    return alone, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--text-words", type=int, default=400_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, found = measure(Path(folder), arguments.rounds, arguments.text_words)
    rows = [("alone", alone.first_line, alone.end, alone.code, "")]
    rows += [(how, run.first_line, run.end, run.code, "alive" if alive else "ended") for how, run, alive in found]
    print_markdown(("second command", "s to its first line", "s to its end", "exit code", "first command"), rows)
    late = [run for _, run, alive in found if run.code or run.first_line > alone.first_line + LONGER or not alive]
    print(
        f"{len(found) - len(late)} of {len(found)} within {LONGER:.0f} s of its own start-up time, beside a living one"
    )
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
