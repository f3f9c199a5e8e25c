"""Stands in for the Hub: serves one model from a folder, at the few addresses that its client asks for."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO, COMMIT = "org/tiny", "a" * 40


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Address of a server that has the files of `folder` as the model REPO."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                self._send(json.dumps([_entry(file) for file in folder.iterdir()]).encode())
            elif path.startswith(f"/api/models/{REPO}"):
                names = [{"rfilename": file.name} for file in folder.iterdir()]
                self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode())
            elif path.startswith(f"/{REPO}/resolve/") and (folder / Path(path).name).exists():
                self._send((folder / Path(path).name).read_bytes())
            else:
                self.send_error(404)

        def _send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def _entry(file: Path) -> dict[str, object]:
    digest = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest}
