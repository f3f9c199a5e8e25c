"""Claim: a run that is struck again and again, by kills and by pauses of all its parts, ends as if nothing had happened.

    python -m benchmarks.chaos --rounds 100 --seed 0

Each round compresses a small model from an object store into it, on a Ray cluster of two nodes, and strikes at random moments: a
worker, the driver, the second node (another one joins) or the object store's server is killed, or a worker, the driver or the server is
paused. One strike in twenty is a long pause, beyond all deadlines: a worker that hangs, or a driver that hangs while another one
takes its place, and then goes on. A driver that fell is started again by the same command. Afterwards the output must be that of
an undisturbed run, to the byte; meanwhile nothing may look finished that is not, and nothing that is finished may be made again.
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
DEADLINE = 30  # seconds of a task
MOST_STARTS = 20  # of a driver in one round: beyond that it does not go on, whatever it says


@dataclass
class Round:
    """What came of one."""

    seed: str
    strikes: list[str] = field(default_factory=list)
    starts: int = 0
    again: int = 0  # tasks that were begun again while a driver ran
    lost: int = 0  # finished files that were made again
    seconds: float = 0.0
    identical: bool = False


class Arena:
    """Cluster, object store and model of all rounds, and the driver of the present one."""

    def __init__(self, cluster: Cluster, server: ObjectStore, node: "subprocess.Popen[bytes]") -> None:
        self.cluster, self.server, self.node = cluster, server, node
        self._ip = 2

    def run(self, seed: str, strikes: int) -> Round:
        """A round with `strikes` strikes, drawn by `seed`."""
        draw, outcome = random.Random(seed), Round(seed)
        output = Store.at(f"{BUCKET}/round-{seed.replace(' ', '-')}")
        started, code, records = time.monotonic(), -1, Records(output)
        while code != 0 and outcome.starts < MOST_STARTS:
            found = 0 if output.exists(MANIFEST) else records.look()
            driver = self._driver(output)
            outcome.starts += 1
            while len(outcome.strikes) < strikes and _still(driver, draw.uniform(1.0, 8.0)):
                strike, driver = self._strike(draw, driver, output)
                outcome.strikes += [strike] if strike else []
                records.look()
            _, said = driver.communicate()
            code = driver.returncode
            outcome.again += said.count("starting it again")
            self._require_honest(output, code, said)
        outcome.lost = records.changed
        if code == 0:
            kept = output.read_json(REPORT).get("files_of_an_earlier_run", 0)
            outcome.lost += max(0, found - kept)
        outcome.seconds = time.monotonic() - started
        outcome.identical = code == 0 and contents(output) == self.expected
        return outcome

    def measure_undisturbed(self) -> float:
        """Seconds of a run that nobody strikes, whose output is what all others are held against."""
        output = Store.at(f"{BUCKET}/undisturbed")
        started = time.monotonic()
        driver = self._driver(output)
        _, said = driver.communicate()
        if driver.returncode:
            raise SystemExit(f"the undisturbed run failed: {said}")
        self.expected = contents(output)
        return time.monotonic() - started

    def _driver(self, output: Store) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "jobs", "compress", f"{BUCKET}/model", output.root, *FLAGS]
        return subprocess.Popen(
            [*command, "--address", self.cluster.address, "--task-deadline", str(DEADLINE)], cwd=ROOT, text=True,
            env=self.cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def _require_honest(self, output: Store, code: int, said: str) -> None:
        if code not in (0, 1, 2, 130, -9):
            raise SystemExit(f"{output.root}: exit {code}: {said}")
        if "Traceback" in said:
            raise SystemExit(f"{output.root}: a traceback: {said}")
        if code and output.exists(MANIFEST) and contents(output) != self.expected:
            raise SystemExit(f"{output.root}: looks finished and is not, exit {code}: {said}")

    def _strike(
        self, draw: random.Random, driver: "subprocess.Popen[str]", output: Store
    ) -> tuple[str, "subprocess.Popen[str]"]:
        """Which strike it was ("": nobody was there to be struck), and the driver after it."""
        strike = draw.choice(LONG_STRIKES if draw.random() < LONG_SHARE else STRIKES)
        if strike == "replace driver":
            return strike, self._replace(driver, output)
        what, pause = strike.split()[1], draw.uniform(0.5, 4.0)
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
        elif victim := self._victim(what, draw, driver):
            with contextlib.suppress(psutil.Error):  # it may end by itself, or be ended for hanging
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
        """Stop a driver until another one has taken its place, then let it go on: it must give way."""
        os.kill(driver.pid, signal.SIGSTOP)
        other = self._driver(output)
        _still(other, LONG_SECONDS)
        os.kill(driver.pid, signal.SIGCONT)
        _, said = driver.communicate()
        self._require_honest(output, driver.returncode, said)
        if driver.returncode == 0 and other.poll() is None:
            raise SystemExit(f"{output.root}: two drivers at once, the first one ended well: {said}")
        return other

    def _victim(self, what: str, draw: random.Random, driver: "subprocess.Popen[str]") -> psutil.Process | None:
        if what == "store":
            return psutil.Process(self.server.process.pid)
        if what == "driver":
            return psutil.Process(driver.pid)
        workers = [worker for worker in workers_at("") if self._is_ours(worker)]
        return draw.choice(sorted(workers, key=lambda worker: worker.pid)) if workers else None

    def _is_ours(self, worker: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return worker.environ().get("RAY_TMPDIR") == self.cluster.folder
        return False


def _still(driver: "subprocess.Popen[str]", seconds: float) -> bool:
    """Whether the driver still runs after some seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)
    return driver.poll() is None


class Records:
    """The records of finished files as they were last seen: one that changes tells that its file was made again."""

    def __init__(self, output: Store) -> None:
        self._store = output.below(FINISHED_FOLDER)
        self._seen: dict[str, bytes] = {}
        self.changed = 0

    def look(self) -> int:
        """How many there are now."""
        found = {}
        with contextlib.suppress(FileNotFoundError, SwscError):  # they go when the run ends
            for name in self._store.names():
                found[name] = bytes(self._store.read(name))
        self.changed += sum(data != self._seen.get(name, data) for name, data in found.items())
        self._seen |= found
        return len(found)


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """Everything that the rounds need."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos"))
        server = stack.enter_context(object_store(Path(folder, "store")))
        stack.enter_context(as_client(server))
        model = make_tiny_model(Path(folder, "model"), layers=LAYERS)
        for path in model.iterdir():
            Store.at(f"{BUCKET}/model").write(path.name, [path.read_bytes()])
        cluster = stack.enter_context(ray_cluster())
        place = Arena(cluster, server, cluster.join("127.0.0.2"))
        stack.callback(lambda: end(place.node))
        yield place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strikes", type=int, default=3, help="in each round")
    arguments = parser.parse_args()
    with arena() as place:
        undisturbed = place.measure_undisturbed()
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(place.run(f"{arguments.seed} {number}", arguments.strikes))
            print(f"{rounds[-1]}", file=sys.stderr, flush=True)
    print_summary(rounds, undisturbed)
    raise SystemExit(not all(outcome.identical and not outcome.lost for outcome in rounds))


def print_summary(rounds: list[Round], undisturbed: float) -> None:
    """A table, and how often each strike fell."""
    strikes = Counter(strike for outcome in rounds for strike in outcome.strikes)
    total = sum(strikes.values())
    lost = sum(outcome.seconds - undisturbed for outcome in rounds) / max(1, total)
    print_markdown(
        ["rounds", "identical", "strikes", "tasks begun again a strike", "finished files lost", "seconds undisturbed",
         "seconds lost a strike"],
        [[len(rounds), sum(outcome.identical for outcome in rounds), total,
          sum(outcome.again for outcome in rounds) / max(1, total), sum(outcome.lost for outcome in rounds), undisturbed, lost]],
    )  # fmt: skip
    print(", ".join(f"{strike} {count}" for strike, count in sorted(strikes.items())))


if __name__ == "__main__":
    main()
