"""A server with the protocol of Google Cloud Storage (gcp-storage-emulator from PyPI), in a separate process."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from unittest import mock

from pipeline.storage import lease
from pipeline.storage.filesystems import files_at
from tests.support.ports import free_port

BUCKET = "gs://models"
# The server writes headers and body separately. With Nagle's algorithm every response would wait 40 ms for the client's
# acknowledgement.
_SERVER = """
from socketserver import StreamRequestHandler
from gcp_storage_emulator.__main__ import main
StreamRequestHandler.disable_nagle_algorithm = True
main()
"""


@contextlib.contextmanager
def google_store() -> Iterator[None]:
    """Start a server that this process and its child processes use while the context lasts; one server at a time."""
    port = free_port()
    command = [sys.executable, "-c", _SERVER, "start", "--host=127.0.0.1", f"--port={port}"]
    flags = ["--in-memory", f"--default-bucket={BUCKET.removeprefix('gs://')}"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
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
    raise RuntimeError("the store does not start")
