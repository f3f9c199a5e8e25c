"""Claim: a run that is disturbed by kills and pauses of all its components writes the same bytes as an undisturbed run.

    python -m benchmarks.chaos --rounds 100 --seed 0

Each round compresses a small model from an object store to the same store, on a Ray cluster of two nodes, and injects
faults at random times: a worker, the driver, the second node (a new one joins) or the server of the object store is
killed, or a worker, the driver or the server is paused. One fault in twenty is a pause longer than all deadlines: a
worker hangs, or a driver hangs, is replaced by another one, and resumes. A driver that ended is started again with the
same command.

Good result, exit code 0: every output is byte-identical to that of the undisturbed run and no finished file was
computed again. The script stops if an output looks finished but is not, or if a command prints a traceback.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.common import contents, print_markdown
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER
from pipeline.errors import SwscError
from pipeline.outputs.owned_files import REPORT
from pipeline.storage.store import Store
from tests.support.object_store import BUCKET, ObjectStore, as_client, object_store
from tests.support.ray_cluster import ROOT, Cluster, end, ray_cluster, raylet_of, workers_at
from tests.support.tiny import make_tiny_model

FLAGS = ["--bits", "4", "--n-init", "60"]
LAYERS = 12
STRIKES = ("kill worker", "kill driver", "kill node", "kill store", "pause worker", "pause driver", "pause store")
LONG_STRIKES, LONG_SHARE, LONG_SECONDS = ("hang worker", "replace driver"), 0.05, 45.0
# Seconds that a task may take.
DEADLINE = 30
# Driver starts in one round, after which the round counts as failed.
MAX_STARTS = 20


@dataclass
class Round:
    """Outcome of one round.

    Attributes:
        strikes: injected faults.
        starts: number of times that a driver was started.
        again: tasks that a running driver started again.
        lost: finished files that were computed again.
        identical: whether the output equals that of the undisturbed run.
    """

    seed: str
    strikes: list[str] = field(default_factory=list)
    starts: int = 0
    again: int = 0
    lost: int = 0
    seconds: float = 0.0
    identical: bool = False


class Arena:
    """Cluster, object store and model of all rounds."""

    def __init__(self, cluster: Cluster, server: ObjectStore, node: "subprocess.Popen[bytes]") -> None:
        self.cluster, self.server, self.node = cluster, server, node
        self._ip = 2

    def run(self, seed: str, strikes: int) -> Round:
        """Run one round with `strikes` faults, which `seed` selects."""
        draw, outcome = random.Random(seed), Round(seed)
        output = Store.at(f"{BUCKET}/round-{seed.replace(' ', '-')}")
        started, code, records = time.monotonic(), -1, Records(output)
        while code != 0 and outcome.starts < MAX_STARTS:
            n_finished = 0 if output.exists(MANIFEST) else records.update()
            driver = self._driver(output)
            outcome.starts += 1
            while len(outcome.strikes) < strikes and _runs_after(driver, draw.uniform(1.0, 8.0)):
                strike, driver = self._strike(draw, driver, output)
                outcome.strikes += [strike] if strike else []
                records.update()
            _, log = driver.communicate()
            code = driver.returncode
            outcome.again += log.count("starting it again")
            self._require_valid(output, code, log)
        outcome.lost = records.changed
        if code == 0:
            n_reused = output.read_json(REPORT).get("files_of_an_earlier_run", 0)
            outcome.lost += max(0, n_finished - n_reused)
        outcome.seconds = time.monotonic() - started
        outcome.identical = code == 0 and contents(output) == self.expected
        return outcome

    def measure_undisturbed(self) -> float:
        """Seconds of a run without faults. Its output is the reference for all others."""
        output = Store.at(f"{BUCKET}/undisturbed")
        started = time.monotonic()
        driver = self._driver(output)
        _, log = driver.communicate()
        if driver.returncode:
            raise SystemExit(f"the undisturbed run failed: {log}")
        self.expected = contents(output)
        return time.monotonic() - started

    def _driver(self, output: Store) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "jobs", "compress", f"{BUCKET}/model", output.root, *FLAGS]
        return subprocess.Popen(
            [*command, "--address", self.cluster.address, "--task-deadline", str(DEADLINE)],
            cwd=ROOT,
            text=True,
            env=self.cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def _require_valid(self, output: Store, code: int, log: str) -> None:
        if code not in (0, 1, 2, 130, -9):
            raise SystemExit(f"{output.root}: exit {code}: {log}")
        if "Traceback" in log:
            raise SystemExit(f"{output.root}: a traceback: {log}")
        if code and output.exists(MANIFEST) and contents(output) != self.expected:
            raise SystemExit(f"{output.root}: looks finished but is not, exit {code}: {log}")

    def _strike(
        self, draw: random.Random, driver: "subprocess.Popen[str]", output: Store
    ) -> tuple[str, "subprocess.Popen[str]"]:
        """Inject one fault; returns its name, "" if its target did not run, and the driver afterwards."""
        strike = draw.choice(LONG_STRIKES if draw.random() < LONG_SHARE else STRIKES)
        if strike == "replace driver":
            return strike, self._replace(driver, output)
        target, pause = strike.split()[1], draw.uniform(0.5, 4.0)
        if strike == "kill node":
            raylet = raylet_of(self.node)
            if raylet:
                raylet.kill()
            end(self.node)
            self._ip = self._ip % 200 + 1
            self.node = self.cluster.join(f"127.0.0.{self._ip + 1}")
        elif strike == "kill store":
            self.server.kill()
            time.sleep(pause)
            self.server.start_again()
        elif victim := self._victim(target, draw, driver):
            with contextlib.suppress(psutil.Error):  # the process may end by itself, or be ended because it hangs
                if strike.startswith("kill"):
                    victim.kill()
                else:
                    victim.suspend()
                    time.sleep(LONG_SECONDS if strike.startswith("hang") else pause)
                    victim.resume()
        else:
            strike = ""
        return strike, driver

    def _replace(self, driver: "subprocess.Popen[str]", output: Store) -> "subprocess.Popen[str]":
        """Pause a driver until another one has replaced it, then resume it: it must stop by itself."""
        os.kill(driver.pid, signal.SIGSTOP)
        replacement = self._driver(output)
        _runs_after(replacement, LONG_SECONDS)
        os.kill(driver.pid, signal.SIGCONT)
        _, log = driver.communicate()
        self._require_valid(output, driver.returncode, log)
        if driver.returncode == 0 and replacement.poll() is None:
            raise SystemExit(f"{output.root}: two drivers at once, the first one succeeded: {log}")
        return replacement

    def _victim(self, target: str, draw: random.Random, driver: "subprocess.Popen[str]") -> psutil.Process | None:
        if target == "store":
            return psutil.Process(self.server.process.pid)
        if target == "driver":
            return psutil.Process(driver.pid)
        workers = [worker for worker in workers_at("") if self._is_ours(worker)]
        return draw.choice(sorted(workers, key=lambda worker: worker.pid)) if workers else None

    def _is_ours(self, worker: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return worker.environ().get("RAY_TMPDIR") == self.cluster.folder
        return False


def _runs_after(driver: "subprocess.Popen[str]", seconds: float) -> bool:
    """Whether the driver still runs after `seconds`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)
    return driver.poll() is None


class Records:
    """Watches the records of finished files. A record that changes means that its file was computed again."""

    def __init__(self, output: Store) -> None:
        self._store = output.below(FINISHED_FOLDER)
        self._seen: dict[str, bytes] = {}
        self.changed = 0

    def update(self) -> int:
        """Read all records, count changes, and return the number of records."""
        records = {}
        with contextlib.suppress(FileNotFoundError, SwscError):  # they are removed when the run ends
            for name in self._store.names():
                records[name] = bytes(self._store.read(name))
        self.changed += sum(data != self._seen.get(name, data) for name, data in records.items())
        self._seen |= records
        return len(records)


@contextlib.contextmanager
def set_up() -> Iterator[Arena]:
    """Set up the cluster, the object store and the model of all rounds."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos"))
        server = stack.enter_context(object_store(Path(folder, "store")))
        stack.enter_context(as_client(server))
        model = make_tiny_model(Path(folder, "model"), layers=LAYERS)
        for path in model.iterdir():
            Store.at(f"{BUCKET}/model").write(path.name, [path.read_bytes()])
        cluster = stack.enter_context(ray_cluster())
        arena = Arena(cluster, server, cluster.join("127.0.0.2"))
        stack.callback(lambda: end(arena.node))
        yield arena


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strikes", type=int, default=3, help="faults in each round")
    arguments = parser.parse_args()
    with set_up() as arena:
        undisturbed = arena.measure_undisturbed()
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(arena.run(f"{arguments.seed} {number}", arguments.strikes))
            print(f"{rounds[-1]}", file=sys.stderr, flush=True)
    print_summary(rounds, undisturbed)
    raise SystemExit(not all(outcome.identical and not outcome.lost for outcome in rounds))


def print_summary(rounds: list[Round], undisturbed: float) -> None:
    """Print a table, and the number of faults of each kind."""
    strikes = Counter(strike for outcome in rounds for strike in outcome.strikes)
    total = sum(strikes.values())
    lost = sum(outcome.seconds - undisturbed for outcome in rounds) / max(1, total)
    row = {
        "rounds": len(rounds),
        "identical": sum(outcome.identical for outcome in rounds),
        "faults": total,
        "tasks started again per fault": sum(outcome.again for outcome in rounds) / max(1, total),
        "finished files computed again": sum(outcome.lost for outcome in rounds),
        "undisturbed, s": undisturbed,
        "lost per fault, s": lost,
    }
    print_markdown(list(row), [list(row.values())])
    print(", ".join(f"{strike} {count}" for strike, count in sorted(strikes.items())))


if __name__ == "__main__":
    main()
