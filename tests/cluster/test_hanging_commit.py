"""A commit runs beside the object, on no worker: it may hang without killing a worker, and has its own deadline."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.ray_cluster import ray_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = """
import sys
import numpy as np
import ray
from pipeline.settings.cluster import ClusterSettings
from pipeline.storage.lease import acquire_lease
from pipeline.checkpoints.tensor_io import Payload, StoredTensor
from pipeline.storage.store import Store
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.progress import Progress
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.stage import Stage
from pipeline.engine.task import Destination, Task
from pipeline.engine.ray_backend.worker_pools import worker_pools
from tests.support.hanging import HangsOnce, PassOn

address, folder, mark = sys.argv[1:]
pools = worker_pools(ClusterSettings(address=address, workers=1, task_deadline=8))
pool = pools(1, Stage("test", WorkerMemory()))
payload = Payload(HangsOnce((StoredTensor("w", "F32", (1,), np.zeros(4, dtype=np.uint8)),), mark))
with acquire_lease(Store.at(folder)) as lease:
    done = []
    where = Destination(lease.ticket, "model-00001-of-00001.safetensors")
    tasks = TaskList([Task("t", PassOn(), "a layer", (ray.put(payload),), outputs=1, commit_to=where)], done.append)
    with Progress("test", 1, 0) as progress:
        execute(pool, tasks, progress)
    pool.close()
    pools.release()
tasks.raise_failures()
print("swsc:", done[0].record.name)
"""


def test_a_commit_that_hangs_is_given_up_and_done_again(tmp_path: Path) -> None:
    with ray_cluster("--num-cpus=1") as cluster:
        done = cluster.run(sys.executable, "-c", SCRIPT, cluster.address, str(tmp_path / "out"), str(tmp_path / "mark"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"a layer: its commit hangs, abandoned after \d+ s; starting it again", done.stderr)
    assert "swsc: model-00001-of-00001.safetensors" in done.stdout
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_size > 4
