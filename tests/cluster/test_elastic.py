"""Clusters that begin without a worker and grow on demand.

Ray's own autoscaler, whose nodes are processes of this machine.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.engine.ray_backend import arithmetic
from tests.support.ports import free_port
from tests.support.ray_cluster import Cluster, ray_cluster
from tests.support.tiny import contents

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs; up to two nodes of one CPU and one (feigned) GPU, when somebody asks for them."""
    port, file = free_port(), tmp_path_factory.mktemp("autoscaler") / "cluster.json"
    gpu = {"resources": {"CPU": 1, "GPU": 1, "memory": 4 << 30}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    settings = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "tests.support.autoscaler.LoopbackProvider",
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {"gpu": gpu, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    } | {f"{part}_commands": [] for part in ("initialization", "setup", "head_setup", "worker_setup")}
    settings |= {"head_start_ray_commands": [], "worker_start_ray_commands": []}
    file.write_text(json.dumps(settings))
    flags = (f"--autoscaling-config={file}", "--num-cpus=0")
    more = ray_cluster(
        *flags, port=port, RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_enable_autoscaler_v2="0"
    )
    with more as cluster:
        yield cluster


def test_a_run_without_a_node_for_it_is_refused_and_elastic_is_suggested(
    growing: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    done = growing.swsc("compress", tiny_model, tmp_path / "out")
    assert done.returncode == 2
    assert "1 workers of 1 CPUs, 0 GPUs do not fit the cluster, which has 0 CPUs and 0 GPUs on 1 nodes" in done.stderr
    assert "--elastic" in done.stderr
    done = growing.swsc("compress", tiny_model, tmp_path / "out", "--elastic")
    assert done.returncode == 2
    assert "--gpus-per-worker" in done.stderr


def test_a_run_waits_for_its_first_gpu_and_takes_those_that_come(
    growing: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    flags = ["--elastic", "--gpus-per-worker", "1", "--bits", "4"]
    done = growing.swsc("compress", tiny_model, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert main(["compress", str(tiny_model), str(tmp_path / "local"), "--bits", "4", "--local"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_run_that_waits_logs_what_it_waits_for(
    growing: Cluster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(arithmetic, "_PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(arithmetic, "log", log)
    flags = ["--elastic", "--gpus-per-worker", "1", "--cpus-per-worker", "5"]
    assert growing.swsc("compress", tiny_model, tmp_path / "out", *flags).returncode == 130
    (line,) = lines
    assert "no worker is up yet, waiting for one: each needs 5 CPUs, 1 GPUs" in line
    assert "the cluster has" in line
