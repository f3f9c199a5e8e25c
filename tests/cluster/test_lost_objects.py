"""An object that is lost with its node is distinguished from a lost worker.

Only the task that made it can recompute it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ray_cluster import ROOT, end, ray_cluster, raylet_of
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = """
import sys
from pipeline.settings.cluster import ClusterSettings
from pipeline.errors import WorkerLost
from pipeline.storage.store import Store
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.stage import Stage
from pipeline.engine.task import Task
from pipeline.engine.ray_backend.worker_pools import worker_pools
from pipeline.tuning.job import KeepState, ReadState

def result_of(task):
    while not (idle := pool.idle()):
        pool.wait()
    pool.start(idle[0], task)
    while not (done := pool.wait()):
        pass
    return done

address, folder, file = sys.argv[1:]
pools = worker_pools(ClusterSettings(address=address, workers=1))
pool = pools(2, Stage("test", WorkerMemory()))
made = result_of(Task("make", ReadState(Store.at(folder), file), "made", outputs=1))
print(made.error, flush=True)
input()
use = Task("use", KeepState(), "used", made.payloads, outputs=1)
while isinstance((done := result_of(use)).error, WorkerLost):
    pass
print("swsc:", type(done.error).__name__, done.error, flush=True)
again = result_of(Task("make", ReadState(Store.at(folder), file), "made", outputs=1))
print("swsc:", result_of(Task("use", KeepState(), "used", again.payloads, outputs=1)).error, flush=True)
"""


def test_what_was_in_a_lost_nodes_memory_is_asked_of_its_maker(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=2)
    file = next(path.name for path in sorted(model.glob("*.safetensors")))
    # Small objects would travel to the driver at once and be safe there.
    with ray_cluster("--num-cpus=0", RAY_max_direct_call_object_size="100") as cluster:
        node = cluster.join("127.0.0.2")
        try:
            script = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, cluster.address, str(model), file], cwd=ROOT, env=cluster.environment,
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert script.stdout is not None
            assert script.stdout.readline() == "None\n"
            raylet = raylet_of(node)
            assert raylet is not None
            raylet.kill()
            with cluster.another_node("127.0.0.3"):
                printed, _ = script.communicate("go on\n", timeout=200)
        finally:
            end(node)
    # Ray speaks, too
    lines = [line.removeprefix("swsc: ") for line in printed.splitlines() if line.startswith("swsc: ")]
    assert lines == ["PayloadLost used: input payload lost with its node", "None"]
