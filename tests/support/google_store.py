"""A server that speaks the protocol of Google Cloud Storage (gcp-storage-emulator from PyPI), in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from pipeline.storage import lease
from pipeline.storage.filesystems import files_at

BUCKET = "gs://models"


@contextlib.contextmanager
def google_store() -> Iterator[None]:
    """Start a server, of which this process and those that it starts are clients as long as the context lasts: one at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("gcp-storage-emulator")),
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
    ]
    flags = ["--in-memory", f"--default-bucket={BUCKET.removeprefix('gs://')}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *flags], **quiet) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/")
            there = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
            with mock.patch.dict(os.environ, there), mock.patch.object(lease, "_SETTLING_SECONDS", 0.0):
                files_at.cache_clear()
                yield
        finally:
            files_at.cache_clear()
            server.kill()


def _wait(server: "subprocess.Popen[bytes]", address: str) -> None:
    for _ in range(120):
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        if server.poll() is not None:
            break
        time.sleep(0.25)
    raise RuntimeError("the store does not come up")
