"""A real Ray cluster on loopback addresses, with ports and a folder of its own; nodes come and go."""

import contextlib
import io
import os
import shutil
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

# A node counts as dead after three seconds without an answer, in place of fourteen.
_HEALTH = {f"RAY_health_check_{name}": value for name, value in (("period_ms", "1000"), ("timeout_ms", "1000"))}
_HEALTH["RAY_health_check_failure_threshold"] = "3"
_STARTS = 3
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """Addresses of the cluster, and the environment that its users need."""

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: str

    def join(self, ip: str, cpus: int = 1) -> "subprocess.Popen[bytes]":
        """Start a node more, with a folder of its own as on a machine of its own; `end` it.

        Nodes that shared one would unpack a job's package over each other: Ray removes what is there first, and with it the
        directory in which the job runs.
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
        """Its process exists before the cluster lists it."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        client = GcsClient(address=self.address)
        for _ in range(240):
            if any(node.node_manager_address == ip for node in client.get_all_node_info().values()):
                return
            time.sleep(0.25)
        raise RuntimeError(f"the node at {ip} is not counted")

    @contextlib.contextmanager
    def another_node(self, ip: str, cpus: int = 1) -> Iterator["subprocess.Popen[bytes]"]:
        """A node more, as long as the context lasts."""
        node = self.join(ip, cpus)
        try:
            yield node
        finally:
            end(node)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster from the repository's root."""
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=540)

    def swsc(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """`swsc …` on the cluster, from this process: a new one would import everything again, which takes seconds."""
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
def ray_cluster(*flags: str, port: int = 0, **more: str) -> Iterator[Cluster]:
    """A head with two CPUs and `flags`, whose processes and users have `more` in their environment."""
    folder = tempfile.mkdtemp(prefix="swsc")  # short: socket paths are limited to 107 bytes
    # The entrypoint of a job is `python`: it must be this one, also where no environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "PATH": path, **_HEALTH, **more}
    node, cluster = _start_head(environment, folder, port, flags)
    try:
        yield cluster
    finally:
        end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(
    environment: dict[str, str], folder: str, port: int, flags: Sequence[str]
) -> tuple["subprocess.Popen[bytes]", Cluster]:
    """A head that answers. One that ends at once is started again with other ports: another process may have taken one."""
    head = [*RAY, "start", "--head", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    for _ in range(_STARTS):
        own, dashboard = port or free_port(), free_port()
        ports = [f"--port={own}", f"--dashboard-port={dashboard}", _agent()]
        node = subprocess.Popen([*head, *ports, *_common(folder), *flags], **_quiet(environment))
        cluster = Cluster(f"127.0.0.1:{own}", f"http://127.0.0.1:{dashboard}", environment, folder)
        if _answers(f"{cluster.dashboard}/api/version", node):
            return node, cluster
        end(node)
    raise RuntimeError("the head of the cluster does not start")


def _common(folder: str) -> list[str]:
    return ["--num-gpus=0", f"--temp-dir={folder}", "--object-store-memory=200000000", "--block"]


def _agent() -> str:
    """Jobs are submitted through a node's agent; its default port may be another cluster's."""
    return f"--dashboard-agent-listen-port={free_port()}"


def raylet_of(node: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The process that is the node, as soon as it is there."""
    family = psutil.Process(node.pid).children(recursive=True)
    return next((process for process in family if process.name() == "raylet"), None)


def server_of(cluster: Cluster) -> psutil.Process:
    """The process that knows of everything in a cluster, of its head."""
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
    """Whether the server answers within two minutes; it does not if its process ends before."""
    for _ in range(480):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return True
        if server.poll() is not None:
            return False
        time.sleep(0.25)
    return False


def end(node: "subprocess.Popen[bytes]") -> None:
    """Stop a node and the processes that it started, and no others."""
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
    """Processes of workers that run a job of the class `kind` ("" is any), of all nodes or of one."""
    family = psutil.Process(node.pid).children(recursive=True) if node else psutil.process_iter()
    found = []
    for process in family:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::ActorWorker") and (not kind or f"ActorWorker.{kind}" in title):
                found.append(process)
    return found
