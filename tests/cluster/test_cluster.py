"""The same bytes however the work is spread, and runs that survive what happens on clusters. Real Ray, real kills."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from jobs.cli import main
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.ray_backend import workers as ray_workers
from pipeline.engine.ray_backend.worker_pools import worker_pools
from pipeline.engine.stage import Stage
from pipeline.settings.cluster import ClusterSettings
from pipeline.storage.local_files import final_name
from tests.support.families import FamilyModel
from tests.support.ray_cluster import RAY, ROOT, Cluster, ray_cluster, raylet_of, server_of, workers_at
from tests.support.tiny import contents, make_text, make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
FLAGS = ("--bits", "4", "--projectors", "q,k,down")


@pytest.fixture(scope="module")
def local(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the plain loop makes."""
    output = tmp_path_factory.mktemp("local") / "out"
    assert main(["compress", str(tiny_model), str(output), "--local", *FLAGS]) == 0
    return contents(output)


def ends_well(done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [1, 3])
def test_ray_run_is_bitwise_equal_to_local_run(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, local: dict[str, bytes], workers: int
) -> None:
    """Three workers fill both nodes: the head has two CPUs, the second node one. (Runs that are cut short have two.)"""
    ends_well(cluster.swsc("compress", tiny_model, tmp_path / "out", *FLAGS, "--workers", workers))
    assert contents(tmp_path / "out") == local


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 21_000, seed=78)


def calibrated(calibration: Path, cache: Path) -> list[object]:
    """Flags of a calibrated compression of three shards of text, its Hessians in `cache`."""
    windows = ["--calibration-windows", 80, "--calibration-seqlen", 256]
    return ["--preset", "best", "--bits", 3, "--calibration", calibration, "--cache-dir", cache, *windows]


def test_hessians_curves_and_compression_of_two_workers_are_bitwise_equal_to_local_ones(
    cluster: Cluster, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    flags = calibrated(calibration, tmp_path / "cache")
    ends_well(cluster.swsc("compress", tiny_model, tmp_path / "out", *flags, "--workers", 2))
    own = [str(flag) for flag in calibrated(calibration, tmp_path / "own")]
    assert main(["compress", str(tiny_model), str(tmp_path / "local"), "--local", *own]) == 0
    ours, theirs = (contents(tmp_path / name) for name in ("local", "out"))
    manifest = "swsc_manifest.json"
    assert {n: d for n, d in ours.items() if n != manifest} == {n: d for n, d in theirs.items() if n != manifest}
    files = [json.loads(made[manifest])["files"] for made in (ours, theirs)]
    assert files[0] == files[1]


def test_stacked_experts_are_the_same_for_any_number_of_workers(
    cluster: Cluster, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    model = FamilyModel("gpt_oss", tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model.dense / file).write_bytes((tiny_model / file).read_bytes())
    flags = ["--preset", "fast", "--bits", 4, "--projectors", "q,experts", "--calibration", calibration]
    flags += ["--calibration-windows", 300, "--calibration-seqlen", 64, "--cache-dir"]
    ends_well(cluster.swsc("compress", model.dense, tmp_path / "out", *flags, tmp_path / "cache", "--workers", 2))
    own = [str(flag) for flag in [*flags, tmp_path / "own"]]
    assert main(["compress", str(model.dense), str(tmp_path / "local"), "--local", *own]) == 0
    files = [json.loads((tmp_path / out / "swsc_manifest.json").read_text())["files"] for out in ("local", "out")]
    assert files[0] == files[1]


def test_a_cluster_of_its_own_listens_on_loopback_only(tmp_path: Path) -> None:
    script = (
        "import psutil\n"
        "from pipeline.settings.cluster import ClusterSettings\n"
        "from pipeline.engine.memory import WorkerMemory\n"
        "from pipeline.engine.stage import Stage\n"
        "from pipeline.engine.ray_backend.worker_pools import worker_pools\n"
        "pools = worker_pools(ClusterSettings(address='local', workers=1)).__enter__()\n"
        "pool = pools(1, Stage('test', WorkerMemory()))\n"
        "while not pool.idle():\n"
        "    pool.wait()\n"
        "me = psutil.Process()\n"
        "for process in [me, *me.children(recursive=True)]:\n"
        "    for found in process.net_connections():\n"
        "        if found.status == psutil.CONN_LISTEN:\n"
        "            print('swsc:', process.name(), found.laddr.ip.removeprefix('::ffff:'))\n"
        "pools.__exit__(None, None, None)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    ends_well(done)
    found = [line.split()[-2:] for line in done.stdout.splitlines() if line.startswith("swsc:")]
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {ip for _, ip in found} == {"127.0.0.1"}


def test_order_of_tasks_does_not_matter(
    tiny_model: Path, tmp_path: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.variants import compress as flow

    def shuffled(pools: Any, stage: Any, tasks: list[Any], *arguments: Any) -> None:
        random.Random(5).shuffle(tasks)
        real(pools, stage, tasks, *arguments)

    real = flow.run_output_stage
    monkeypatch.setattr(flow, "run_output_stage", shuffled)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", *FLAGS]) == 0
    assert contents(tmp_path / "out") == local


def submitted(cluster: Cluster, *argv: object) -> "subprocess.Popen[str]":
    """One command as one job. (Ray removes a job's working directory when its first driver ends: no chains.)"""
    job = [*RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--", "python", "-m", "jobs"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*job, *map(str, argv)], cwd=ROOT, env=cluster.environment, **pipes)


def end_well(*jobs: "subprocess.Popen[str]") -> None:
    for job in jobs:
        printed, _ = job.communicate(timeout=540)
        assert job.returncode == 0, printed


def test_every_verb_works_as_a_submitted_job(
    cluster: Cluster, tiny_model: Path, text: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    """Two at a time, with a worker each: a new process of each imports everything."""
    out, dense, result = tmp_path / "out", tmp_path / "dense", tmp_path / "e.json"
    one = ("--workers", 1)
    end_well(submitted(cluster, "plan", tiny_model), submitted(cluster, "compress", tiny_model, out, *FLAGS, *one))
    assert contents(out) == local
    measured = ("--text", text, "--seqlen", 64, "--windows", 3, "--json", result)
    end_well(submitted(cluster, "restore", out, dense, *one), submitted(cluster, "evaluate", out, *measured, *one))
    assert len(json.loads(result.read_text())["nll_per_window"]) == 3
    assert main(["verify", str(dense), "--local"]) == 0


def test_a_sweep_of_two_models_and_four_variants_is_one_job_and_equals_the_local_one(
    cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    models = [make_tiny_model(tmp_path / f"m{seed}", seed=seed, layers=2) for seed in range(2)]
    (tmp_path / "s.yaml").write_text(
        f"models: [{models[0]}, {models[1]}]\n"
        f"evaluations: [{{text: {text}, seqlen: 64, windows: 6}}]\n"
        "variants:\n"
        "  - {name: q, projectors: q, bits: 4}\n"
        "  - {name: qk, projectors: 'q,k', bits: 4}\n"
        "  - {name: mlp, projectors: 'gate,up,down', bits: 4}\n"
        "  - {name: rtn, projectors: 'q,k', method: rtn, bits: 3}\n"
    )
    end_well(submitted(cluster, "sweep", tmp_path / "s.yaml", "--out", tmp_path / "ray"))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "local"), "--local"]) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("ray", "local"))
    assert len(one) == 2 * 5
    assert one == other


def test_perplexity_is_bit_identical_for_any_number_of_workers(
    cluster: Cluster, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--text", text, "--seqlen", 64, "--json", tmp_path / "e.json")
    found = []
    for workers in (1, 3):
        ends_well(cluster.swsc("evaluate", tiny_model, *flags, "--workers", workers))
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["nll_per_window"] == found[1]["nll_per_window"]
    assert len({result["perplexity"] for result in found}) == 1


def test_a_request_that_the_cluster_can_never_meet_is_refused_with_what_it_has(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    # No node has three CPUs, though all nodes together have.
    for flags in (["--workers", "4"], ["--gpus-per-worker", "1"], ["--cpus-per-worker", "3"]):
        done = cluster.swsc("compress", tiny_model, tmp_path / "out", *flags)
        assert done.returncode == 2
        assert "do not fit the cluster, which has 3 CPUs and 0 GPUs" in done.stderr
    assert not (tmp_path / "out" / "swsc_manifest.json").exists()


def test_a_worker_that_no_node_has_the_memory_for_is_refused_with_the_estimate(
    cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model")
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    done = cluster.swsc("evaluate", model, "--text", text, "--seqlen", 64, "--batch-size", 10**8)
    assert done.returncode == 2
    needed = re.search(r"needs ([\d.]+) GB", done.stderr)
    assert needed, done.stderr
    logits = 10**8 * 64 * vocabulary * 4 / 1e9
    assert logits < float(needed[1]) < 10 * logits  # activations are of the same order in a model this small


def test_no_more_workers_are_made_than_the_memory_of_each_node_holds(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(memory: int, asked_for: int | None) -> int:
        with worker_pools(ClusterSettings(workers=asked_for)) as pools:
            return pools(9, Stage("test", WorkerMemory(cpu=memory))).size

    monkeypatch.chdir(ROOT)
    ray.init(cluster.address, log_to_driver=False)
    try:
        node = min(int(node["Resources"]["memory"]) for node in ray.nodes())
        assert workers(1, None) == 3
        assert workers(node * 2 // 3, None) == 2
        assert workers(node * 2 // 3, 3) == 3, "a number that the user gave stands"
    finally:
        ray.shutdown()


def test_no_cluster_at_the_address_is_one_clear_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--address", "127.0.0.1:1"]) == 2
    assert "error: no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


class TestRunsThatAreCutShort:
    """A model that takes several seconds, so that there is time to strike."""

    SLOW = ("--bits", "4", "--n-init", "150")

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_tiny_model(tmp_path_factory.mktemp("slow") / "model", layers=12)

    @pytest.fixture(scope="class")
    def straight(self, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
        output = tmp_path_factory.mktemp("straight") / "out"
        assert main(["compress", str(model), str(output), "--local", *self.SLOW]) == 0
        return contents(output)

    def begin(self, cluster: Cluster, model: Path, output: Path, *more: str) -> "subprocess.Popen[str]":
        """A command in a process of its own, so that its driver can be killed."""
        command = [sys.executable, "-m", "jobs", "compress", str(model), str(output), *self.SLOW]
        flags = ["--address", cluster.address, "--workers", "2", *more]
        return subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, met: Callable[[], object]) -> None:
        for _ in range(1200):
            if met():
                return
            time.sleep(0.05)
        raise AssertionError("the condition was not met within a minute")

    def has_files(self, output: Path, count: int) -> bool:
        return self.finished_files(output) >= count

    def finished_files(self, output: Path) -> int:
        """Number of records of finished files; one that is being written still has a temporary name."""
        return len([path for path in output.glob(".swsc/done/*") if final_name(path.name) is None])

    def busy_worker(self, output: Path) -> psutil.Process:
        """A worker that compresses a layer, once two layers are finished."""
        self.wait_until(lambda: self.finished_files(output) >= 2)
        for _ in range(1200):
            if busy := workers_at("CompressLayer"):
                return busy[0]
            time.sleep(0.05)
        raise AssertionError("no worker compresses a layer")

    def struck(
        self, cluster: Cluster, model: Path, output: Path, strike: Callable[[threading.Event], None], *flags: str
    ) -> "subprocess.CompletedProcess[str]":
        """A compression in this process while `strike` runs in a thread; its event is set when the command ends."""
        ended = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            striking = thread.submit(strike, ended)
            try:
                done = cluster.swsc("compress", model, output, *self.SLOW, *flags)
            finally:
                ended.set()
            striking.result()
        return done

    def test_a_killed_worker_is_replaced_and_nothing_differs(
        self, cluster: Cluster, model: Path, tmp_path: Path, straight: dict[str, bytes]
    ) -> None:
        def strike(ended: threading.Event) -> None:
            self.busy_worker(tmp_path / "out").kill()

        done = self.struck(cluster, model, tmp_path / "out", strike, "--workers", "2")
        ends_well(done)
        assert "starting it again" in done.stderr
        assert contents(tmp_path / "out") == straight

    def test_a_worker_that_hangs_is_given_up_and_nothing_differs(
        self, cluster: Cluster, model: Path, tmp_path: Path, straight: dict[str, bytes]
    ) -> None:
        victims: list[psutil.Process] = []

        def strike(ended: threading.Event) -> None:
            victims.append(self.busy_worker(tmp_path / "out"))
            victims[0].suspend()

        flags = ["--workers", "2", "--task-deadline", "10"]
        done = self.struck(cluster, model, tmp_path / "out", strike, *flags)
        ends_well(done)
        assert re.search(r"hangs, abandoned after 1\d s; starting it again", done.stderr), done.stderr
        assert contents(tmp_path / "out") == straight
        (victim,) = victims
        self.wait_until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)

    def test_a_node_that_is_lost_and_one_that_joins_change_nothing_but_who_works(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        model = make_tiny_model(tmp_path / "model", layers=30)
        with cluster.another_node("127.0.0.3") as third:

            def strike(ended: threading.Event) -> None:
                self.wait_until(lambda: self.finished_files(tmp_path / "out") >= 2 and workers_at("", third))
                raylet = raylet_of(third)
                assert raylet is not None
                raylet.kill()
                with cluster.another_node("127.0.0.4") as fourth:
                    self.wait_until(lambda: workers_at("CompressLayer", fourth) or ended.is_set())
                    assert not ended.is_set(), "a worker has started on the new node"
                    ended.wait(300)

            ends_well(self.struck(cluster, model, tmp_path / "out", strike))
        assert main(["compress", str(model), str(tmp_path / "straight"), "--local", *self.SLOW]) == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "straight")

    def test_a_driver_that_is_stopped_leaves_no_model_and_the_same_command_goes_on(
        self, cluster: Cluster, model: Path, tmp_path: Path, straight: dict[str, bytes]
    ) -> None:
        output, finished = tmp_path / "out", 0
        for blow in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            run = self.begin(cluster, model, output)
            self.wait_until(functools.partial(self.has_files, output, finished + 1))
            run.send_signal(blow)
            _, error = run.communicate(timeout=60)
            if blow is not signal.SIGKILL:
                assert run.returncode == 130
                assert "Traceback" not in error
                assert error.strip().splitlines()[-1].startswith("interrupted: ")
            assert not (output / "config.json").exists()
            assert not (output / "swsc_manifest.json").exists()
            assert self.finished_files(output) > finished
            finished = self.finished_files(output)
        ends_well(cluster.swsc("compress", model, output, *self.SLOW, "--workers", 2))
        assert contents(output) == straight

    def test_a_driver_killed_at_nine_tenths_of_thirty_layers_loses_what_was_in_flight_at_most(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        model, output = make_tiny_model(tmp_path / "model", layers=30), tmp_path / "out"
        run = self.begin(cluster, model, output, "--n-init", "20")
        self.wait_until(lambda: self.finished_files(output) >= 27)
        run.kill()
        run.communicate(timeout=60)
        finished = self.finished_files(output)
        ends_well(cluster.swsc("compress", model, output, *self.SLOW, "--n-init", 20, "--workers", 2))
        kept = json.loads((output / "swsc_report.json").read_text())["files_of_an_earlier_run"]
        assert kept >= finished >= 27
        assert main(["compress", str(model), str(tmp_path / "straight"), "--local", *self.SLOW, "--n-init", "20"]) == 0
        assert contents(output) == contents(tmp_path / "straight")

    def test_without_the_clusters_head_a_run_ends_and_goes_on_elsewhere(
        self, cluster: Cluster, model: Path, tmp_path: Path, straight: dict[str, bytes]
    ) -> None:
        output = tmp_path / "out"
        with ray_cluster(RAY_gcs_rpc_server_reconnect_timeout_s="8") as doomed:
            run = self.begin(doomed, model, output)
            self.wait_until(lambda: self.finished_files(output) >= 3)
            server_of(doomed).kill()
            _, error = run.communicate(timeout=120)
        assert run.returncode not in (0, 2)
        assert "Traceback" not in error
        assert not (output / "swsc_manifest.json").exists()
        ends_well(cluster.swsc("compress", model, output, *self.SLOW, "--workers", 2))
        assert contents(output) == straight

    def test_a_run_whose_workers_are_killed_for_their_memory_ends_with_an_error_that_names_them(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_workers, "_MAX_DEATHS", 4)
        monkeypatch.setattr(ray_workers, "_MAX_DEATHS_PER_WORKER", 2)
        # any use is too much
        with ray_cluster(RAY_memory_usage_threshold="0.0001", RAY_memory_monitor_refresh_ms="100") as cluster:
            done = cluster.swsc("compress", model, tmp_path / "out", *self.SLOW, "--workers", 2)
        assert done.returncode == 1
        assert re.search(r"^error: workers died \d+ times in a row", done.stderr, re.MULTILINE), done.stderr
        assert not (tmp_path / "out" / "swsc_manifest.json").exists()
