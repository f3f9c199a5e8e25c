"""A Ray cluster on loopback addresses, with free ports and a temporary directory; nodes can be added and removed."""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.support.ports import free_port
from tests.support.project import ROOT

# Ray declares a node dead after three seconds without an answer, instead of fourteen.
_HEALTH = {f"RAY_health_check_{name}": value for name, value in (("period_ms", "1000"), ("timeout_ms", "1000"))}
_HEALTH["RAY_health_check_failure_threshold"] = "3"
_STARTS = 3
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        address: address of the head.
        dashboard: URL of the dashboard.
        environment: environment variables that its users need.
        folder: temporary directory of the cluster.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: str

    def join(self, ip: str, cpus: int = 1) -> "subprocess.Popen[bytes]":
        """Start another node with a separate temporary directory, as on a separate machine; `end` stops it.

        Nodes that shared one would unpack a job's package over each other: Ray removes what is there first, and with it
        the directory in which the job runs.
        """
        folder = tempfile.mkdtemp(prefix="n", dir=self.folder)
        address = ["start", f"--address={self.address}", f"--node-ip-address={ip}", f"--num-cpus={cpus}"]
        node = subprocess.Popen([*RAY, *address, _agent(), *_common(folder)], **_quiet(self.environment))
        try:
            _wait_for_raylet(node)
            self._wait_to_be_counted(ip)
        except BaseException:
            end(node)
            raise
        return node

    def _wait_to_be_counted(self, ip: str) -> None:
        """Wait until the cluster lists the node, which happens after its process has started."""
        for _ in range(240):
            if self.lists(ip):
                return
            time.sleep(0.25)
        raise RuntimeError(f"the node at {ip} is not counted")

    def lists(self, ip: str) -> bool:
        """Whether the cluster has a node at this address."""
        return ip in self.nodes()

    def nodes(self) -> list[str]:
        """Addresses of the nodes. Ray gives the head the address of the machine instead of a loopback address."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return [node.node_manager_address for node in GcsClient(address=self.address).get_all_node_info().values()]

    @contextlib.contextmanager
    def another_node(self, ip: str, cpus: int = 1) -> Iterator["subprocess.Popen[bytes]"]:
        """Another node, while the context lasts."""
        node = self.join(ip, cpus)
        try:
            yield node
        finally:
            end(node)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command that uses the cluster, in the root of the repository."""
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=540)

    def swsc(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """Run `swsc …` on the cluster from this process; a new process would spend seconds on imports."""
        import ray

        from jobs.cli import main

        command, out, err = [*map(str, argv), "--address", self.address], io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ, self.environment), contextlib.chdir(ROOT):
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = main(command)
            finally:
                ray.shutdown()
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def ray_cluster(*flags: str, port: int = 0, dashboard: bool = False, **more: str) -> Iterator[Cluster]:
    """Start a head node with two CPUs.

    Args:
        flags: further flags of `ray start`.
        port: port of the head; a free one if 0.
        dashboard: start a dashboard, to which jobs are submitted; it takes longer than the rest of the cluster.
        more: environment variables of the cluster's processes and users.
    """
    # a short path, because paths of sockets are limited to 107 bytes
    folder = tempfile.mkdtemp(prefix="swsc")
    # the entrypoint of a job is `python`, which has to be this interpreter even if no environment is activated
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "PATH": path, **_HEALTH, **more}
    node, cluster = _start_head(environment, folder, port, dashboard, flags)
    try:
        yield cluster
    finally:
        end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(
    environment: dict[str, str], folder: str, port: int, dashboard: bool, flags: Sequence[str]
) -> tuple["subprocess.Popen[bytes]", Cluster]:
    """Start a head that answers; after a failure, try other ports, because another process may have taken one."""
    head = [*RAY, "start", "--head", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    head.append(f"--include-dashboard={str(dashboard).lower()}")
    for _ in range(_STARTS):
        head_port, web = port or free_port(), free_port()
        ports = [f"--port={head_port}", f"--dashboard-port={web}", _agent()]
        node = subprocess.Popen([*head, *ports, *_common(folder), *flags], **_quiet(environment))
        cluster = Cluster(f"127.0.0.1:{head_port}", f"http://127.0.0.1:{web}", environment, folder)
        if _is_up(cluster, node) and (not dashboard or _answers(f"{cluster.dashboard}/api/version", node)):
            return node, cluster
        end(node)
    raise RuntimeError("the head of the cluster does not start")


def _is_up(cluster: Cluster, head: "subprocess.Popen[bytes]") -> bool:
    """Whether the cluster lists its head as a node within two minutes; it does not if the head's process ends."""
    from ray.exceptions import RayError

    for _ in range(480):
        if head.poll() is not None:
            return False
        with contextlib.suppress(OSError, RayError):
            host, _, port = cluster.address.partition(":")
            socket.create_connection((host, int(port)), timeout=2).close()
            if cluster.nodes():
                return True
        time.sleep(0.25)
    return False


def _common(folder: str) -> list[str]:
    return ["--num-gpus=0", f"--temp-dir={folder}", "--object-store-memory=200000000", "--block"]


def _agent() -> str:
    """A free port for the node's agent, which accepts jobs; another cluster may use the default port."""
    return f"--dashboard-agent-listen-port={free_port()}"


def raylet_of(node: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The raylet process of a node; None until it has started."""
    family = psutil.Process(node.pid).children(recursive=True)
    return next((process for process in family if process.name() == "raylet"), None)


def server_of(cluster: Cluster) -> psutil.Process:
    """The global control service (GCS) of the cluster, a process of its head."""
    servers = [process for process in psutil.process_iter() if process.name() == "gcs_server"]
    return next(process for process in servers if cluster.folder in " ".join(process.cmdline()))


def _wait_for_raylet(node: "subprocess.Popen[bytes]") -> None:
    for _ in range(240):
        if raylet_of(node):
            return
        time.sleep(0.5)
    raise RuntimeError("the node does not start")


def _quiet(environment: dict[str, str]) -> dict[str, Any]:
    return {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}


def _answers(url: str, server: "subprocess.Popen[bytes]") -> bool:
    """Whether the server answers within two minutes, before its process ends."""
    for _ in range(480):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return True
        if server.poll() is not None:
            return False
        time.sleep(0.25)
    return False


def end(node: "subprocess.Popen[bytes]") -> None:
    """Stop a node and the processes that it started."""
    family = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    node.terminate()
    try:
        node.wait(20)
    except subprocess.TimeoutExpired:
        node.kill()
    for process in family:
        if process.is_running():
            process.kill()


def workers_at(kind: str, node: "subprocess.Popen[bytes] | None" = None) -> list[psutil.Process]:
    """Worker processes that run a job of the class `kind` ("" for any class), on all nodes or on one node."""
    family = psutil.Process(node.pid).children(recursive=True) if node else psutil.process_iter()
    workers = []
    for process in family:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::ActorWorker") and (not kind or f"ActorWorker.{kind}" in title):
                workers.append(process)
    return workers
