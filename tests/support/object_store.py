"""An S3 server (SeaweedFS from PyPI) on free loopback ports, with one bucket."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from pipeline.storage import lease
from pipeline.storage.filesystems import files_at
from pipeline.storage.store import Store
from tests.support.ports import free_ports

BUCKET = "s3://models"
_LOG = "server.log"
# offset of the gRPC port of each server; all ports stay below those that Linux assigns to clients (32768 and up)
_GRPC = 10000
# attempts to start, each with other ports: another process may have taken a port since it was found free
_STARTS = 3


class ServerStartError(RuntimeError):
    """The server ended or does not answer; the message is the end of its log."""


@dataclass
class ObjectStore:
    """A running server.

    Attributes:
        folder: directory of its data and its log.
        ports: name of a service -> port.
        environment: environment variables that its clients need.
        process: the server.
    """

    folder: Path
    ports: dict[str, int]
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        """Kill the server without a shutdown."""
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Start the server again with the same data."""
        self.process = _start(self.folder, self.ports, self.environment)
        self.wait()

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerStartError: the server ended, or does not answer within a minute.
        """
        import pyarrow.fs as arrow

        for _ in range(240):
            with contextlib.suppress(OSError):
                system = arrow.S3FileSystem(
                    endpoint_override=self.environment["AWS_ENDPOINT_URL"], region="us-east-1",
                    access_key=self.environment["AWS_ACCESS_KEY_ID"],
                    secret_key=self.environment["AWS_SECRET_ACCESS_KEY"], connect_timeout=2, request_timeout=5,
                )  # fmt: skip
                if system.get_file_info("models").type != arrow.FileType.NotFound:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.25)
        raise ServerStartError((self.folder / _LOG).read_text(errors="replace")[-2000:])


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Start a server that keeps its data in `folder`, and stop it."""
    server = _started(folder)
    try:
        yield server
    finally:
        server.kill()


def _started(folder: Path) -> ObjectStore:
    for attempt in range(1, _STARTS + 1):
        server = _new(folder / str(attempt))
        try:
            server.wait()
            return server
        except ServerStartError:
            server.kill()
            if attempt == _STARTS:
                raise
    raise AssertionError


def _new(folder: Path) -> ObjectStore:
    folder.mkdir(parents=True)
    ports = dict(
        zip(("master", "volume", "filer", "s3", "admin"), free_ports(5, 11000, 22700, twin=_GRPC), strict=True)
    )
    environment = {
        **os.environ, "AWS_ACCESS_KEY_ID": "swsc-tests", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    return ObjectStore(folder, ports, environment, _start(folder, ports, environment))


@contextlib.contextmanager
def as_client(server: ObjectStore, alone: bool = False) -> Iterator[None]:
    """Make this process a client of the server while the context lasts.

    Args:
        server: the server.
        alone: there is no other client, so that leases need not wait.
    """
    variables = {key: value for key, value in server.environment.items() if key.startswith("AWS_")}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(lease, "_SETTLING_SECONDS", 0.0 if alone else lease._SETTLING_SECONDS),
    ):
        files_at.cache_clear()
        try:
            yield
        finally:
            files_at.cache_clear()


def upload(folder: Path, address: str) -> str:
    """Copy the files of a directory tree to an address, and return the address."""
    store = Store.at(address)
    for path in filter(Path.is_file, folder.rglob("*")):
        store.write(str(path.relative_to(folder)), [path.read_bytes()])
    return address


def stored(address: str) -> dict[str, bytes]:
    """The content of every file of an output at any address, except the report: like `tiny.contents`."""
    store = Store.at(address)
    return {name: bytes(store.read(name)) for name in store.names() if name != "swsc_report.json"}


def _start(folder: Path, ports: dict[str, int], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    flags = [
        f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET.removeprefix('s3://')}",
        "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / _LOG).open("ab") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("weed")), "mini", *flags], env=environment, stdout=log, stderr=log
        )
