"""A run seen from outside: memory of its processes and what its workers are doing, sampled.

Each sample takes RSS and the title that Ray gives a worker; a thorough one takes PSS and USS too, which costs the kernel a
walk over all pages. RSS counts every page that is mapped, those of the object store too, and is what the limits hold
for; PSS shares a page out among those who map it, USS leaves shared pages out.
"""

import os
import time
from collections import Counter, defaultdict
from typing import Any

import psutil

from benchmarks.common import print_markdown

LIMITS = {"driver": 1.0, "ray::ActorWorker": 1.5, "ray::commit": 1.5, "ray::IDLE": 1.5}  # GB of RSS


class Watch:
    """Peak memory of the driver and of Ray's processes below it by kind, and what workers were seen at."""

    def __init__(self, driver: psutil.Process) -> None:
        self.driver = driver
        self.peaks: dict[str, Counter[str]] = defaultdict(Counter)  # kind -> {"rss", "pss", "uss"} of one process
        self.seconds: Counter[str] = Counter()  # title of a worker -> seconds that it was seen with it
        self.workers = 0  # most at once: a worker that died and its substitute are one
        self.sampled = time.perf_counter()
        self.processes: tuple[psutil.Process, ...] = ()

    def sample(self, thorough: bool) -> None:
        """Titles and RSS; if `thorough`, look for new processes and take PSS and USS too, which costs more."""
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
                continue  # it ended meanwhile
            self._note(title, memory._asdict(), self.sampled - last)
            workers += title.startswith("ray::ActorWorker")
        self.workers = max(self.workers, workers)

    def _note(self, title: str, memory: dict[str, int], seconds: float) -> None:
        kind = title.split(".")[0]
        for what in ("rss", "pss", "uss"):
            self.peaks[kind][what] = max(self.peaks[kind][what], memory.get(what, 0))
        if kind in ("ray::ActorWorker", "ray::commit"):
            self.seconds[title] += seconds


def print_memory(watch: Watch) -> None:
    rows = [
        (kind, *(f"{peak[what] / 1e9:.2f}" for what in ("rss", "pss", "uss")), LIMITS.get(kind, ""))
        for kind, peak in sorted(watch.peaks.items(), key=lambda item: -item[1]["rss"])
    ]
    print_markdown(("process (largest of its kind)", "peak RSS, GB", "peak PSS", "peak USS", "limit of RSS"), rows)


def print_time(watch: Watch, report: dict[str, Any], wall: float) -> None:
    """Worker seconds by what they were spent on: measured by the workers, and sampled by their titles."""
    available = report["seconds"] * watch.workers
    encoding = sum(row.get("seconds", 0.0) for row in report["tensors"])
    phases = report["phases"]
    shares = {"reading": phases["read"], "K-Means": phases["kmeans"], "SVD": phases["svd"]}
    shares["restoring, measuring, packing"] = encoding - phases["kmeans"] - phases["svd"]
    shares["rest: copying, start of Ray, hand-over, idle"] = available - sum(shares.values())
    print(f"\nWall time {wall:.1f} s, of it {report['seconds']:.1f} s in the run, with {watch.workers} workers:\n")
    print_markdown(
        ("worker time, measured", "s", "share"),
        [(name, f"{seconds:.1f}", f"{seconds / available:.1%}") for name, seconds in shares.items()],
    )
    print()
    print_markdown(
        ("all workers and commits by title, sampled", "s"),
        [(title, f"{seconds:.1f}") for title, seconds in sorted(watch.seconds.items())],
    )
    print(f"\nThe watcher itself took {time.process_time() / wall:.1%} of a core.")


def print_verdict(watch: Watch) -> int:
    broken = [kind for kind, limit in LIMITS.items() if watch.peaks[kind]["rss"] > limit * 1e9]
    print(f"\nLimits: {'broken by ' + ', '.join(broken) if broken else 'kept'}.")
    return 1 if broken else 0
