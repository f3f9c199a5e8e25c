"""Samples of the processes of a run: their memory, and the activity of Ray's workers.

Each sample takes RSS and the title that Ray gives a worker. A thorough sample also takes PSS and USS, for which the
kernel walks all pages. RSS counts every mapped page, including those of the object store, and is what the limits refer
to; PSS divides a shared page among the processes that map it; USS omits shared pages.
"""

import os
import time
from collections import Counter, defaultdict
from typing import Any

import psutil

from benchmarks.common import print_markdown

# GB of RSS.
LIMITS = {"driver": 1.0, "ray::ActorWorker": 1.5, "ray::commit": 1.5, "ray::IDLE": 1.5}


class Watch:
    """Peak memory of the driver and of Ray's child processes, and the seconds that workers spent on each activity.

    Attributes:
        peaks: kind of process -> peak "rss", "pss" and "uss" of one process.
        seconds: title of a worker -> seconds in which it had this title.
        workers: largest number of workers at once; a worker that died and its replacement count once.
    """

    def __init__(self, driver: psutil.Process) -> None:
        self.driver = driver
        self.peaks: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)
        self.workers = 0
        self.sampled = time.perf_counter()
        self.processes: tuple[psutil.Process, ...] = ()

    def sample(self, thorough: bool) -> None:
        """Take titles and RSS; if `thorough`, also look for new processes and take PSS and USS, which is slower."""
        last, self.sampled = self.sampled, time.perf_counter()
        if thorough:
            self.processes = (self.driver, *self.driver.children(recursive=True))
        workers = 0
        for process in self.processes:
            try:
                title = "driver" if process == self.driver else os.path.basename((process.cmdline() or [""])[0])
                if not title.startswith(("driver", "ray::", "raylet")):
                    continue
                memory = process.memory_full_info() if thorough else process.memory_info()
            except psutil.Error:
                continue  # the process has ended
            self._note(title, memory._asdict(), self.sampled - last)
            workers += title.startswith("ray::ActorWorker")
        self.workers = max(self.workers, workers)

    def _note(self, title: str, memory: dict[str, int], seconds: float) -> None:
        kind = title.split(".")[0]
        for measure in ("rss", "pss", "uss"):
            self.peaks[kind][measure] = max(self.peaks[kind][measure], memory.get(measure, 0))
        if kind in ("ray::ActorWorker", "ray::commit"):
            self.seconds[title] += seconds


def print_memory(watch: Watch) -> None:
    rows = [
        (kind, *(f"{peak[measure] / 1e9:.2f}" for measure in ("rss", "pss", "uss")), LIMITS.get(kind, ""))
        for kind, peak in sorted(watch.peaks.items(), key=lambda item: -item[1]["rss"])
    ]
    print_markdown(("process (largest of its kind)", "peak RSS, GB", "peak PSS", "peak USS", "limit of RSS"), rows)


def print_time(watch: Watch, report: dict[str, Any], wall: float) -> None:
    """Print the seconds of workers by activity, as the workers measured them and as sampled from their titles."""
    available = report["seconds"] * watch.workers
    encoding = sum(row.get("seconds", 0.0) for row in report["tensors"])
    phases = report["phases"]
    shares = {"reading": phases["read"], "K-Means": phases["kmeans"], "SVD": phases["svd"]}
    shares["restoring, measuring, packing"] = encoding - phases["kmeans"] - phases["svd"]
    shares["other: copying, start of Ray, transfer, idle"] = available - sum(shares.values())
    print(f"\nWall time {wall:.1f} s, of which the run took {report['seconds']:.1f} s, with {watch.workers} workers:\n")
    print_markdown(
        ("worker time, measured", "s", "share"),
        [(name, f"{seconds:.1f}", f"{seconds / available:.1%}") for name, seconds in shares.items()],
    )
    print()
    print_markdown(
        ("all workers and commits by title, sampled", "s"),
        [(title, f"{seconds:.1f}") for title, seconds in sorted(watch.seconds.items())],
    )
    print(f"\nSampling took {time.process_time() / wall:.1%} of a core.")


def print_verdict(watch: Watch) -> int:
    broken = [kind for kind, limit in LIMITS.items() if watch.peaks[kind]["rss"] > limit * 1e9]
    print(f"\nLimits: {'exceeded by ' + ', '.join(broken) if broken else 'met'}.")
    return 1 if broken else 0
