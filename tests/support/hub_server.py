"""Servers that replace the Hugging Face Hub in tests: one serves a model from a directory, one accepts uploads.

They answer only the requests that the client sends. The client reads its settings when it is imported, so a test either
starts a process with other settings, which takes seconds, or changes them by `client_of`. Large files are transferred
by LFS, which needs HF_HUB_DISABLE_XET=1, because the protocol of the newer store is not documented.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants

REPO, COMMIT = "org/tiny", "a" * 40


@contextmanager
def client_of(address: str, home: Path) -> Iterator[None]:
    """Point the client in this process to the server at `address`; it logs in by HF_TOKEN only and caches in `home`."""
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(constants, name, value))
        yield


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Address of a server that serves the files of `folder` as the model REPO."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                self._send(json.dumps([_entry(folder, file) for file in _files(folder)]).encode())
            elif path.startswith(f"/api/models/{REPO}"):
                names = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
                self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode())
            elif path.startswith(f"/{REPO}/resolve/") and (folder / _named(path)).exists():
                self._send((folder / _named(path)).read_bytes())
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

    with _served(Handler) as address:
        yield address


@contextmanager
def _served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _named(path: str) -> str:
    """NAME of the path /REPO/resolve/REVISION/NAME."""
    return path.removeprefix(f"/{REPO}/resolve/").partition("/")[2]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _entry(folder: Path, file: Path) -> dict[str, object]:
    digest = hashlib.sha1(file.read_bytes()).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": str(file.relative_to(folder)), "oid": digest}
    size = entry["size"] = file.stat().st_size
    if file.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(file.read_bytes()).hexdigest(), "size": size, "pointerSize": 130}
    return entry


@dataclass
class Repo:
    """A repository: its branches, each path -> content, and the messages of its commits."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class PushedHub:
    """State of a server that accepts uploads.

    Attributes:
        token: token that clients need.
        address: address of the server.
        repos: repository name -> repository.
        blobs: sha256 -> content of large files.
        sent: sha256 of each large file, in the order of upload.
    """

    token: str
    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the response to a request with the right token."""
        if method == "PUT":
            digest = hashlib.sha256(body).hexdigest()
            assert path == f"/lfs/{digest}"
            self.blobs[digest] = body
            self.sent.append(digest)
            return 200, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._upload_action(blob) for blob in json.loads(body)["objects"]]}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(tree|branch|preupload|commit)/([^/]+))?", path)
        if match is None or match[1] not in self.repos:
            return 404, {"error": f"no {path}"}
        repo = self.repos[match[1]]
        if match[3] is None:
            return 200, {"id": match[1], "sha": COMMIT, "private": repo.private, "siblings": []}
        if match[3] == "branch":
            exists = match[4] in repo.branches
            repo.branches.setdefault(match[4], dict(repo.branches["main"]))
            return (409 if exists else 200), {}
        return 200, getattr(self, f"_{match[3]}")(repo, match[1], match[4], body)

    def _create(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = f"{request['organization']}/{request['name']}"
        exists = name in self.repos
        self.repos.setdefault(name, Repo(request.get("visibility") == "private"))
        return (409 if exists else 200), {"url": f"{self.address}/{name}"}

    def _upload_action(self, blob: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.address}/lfs/{blob['oid']}"}}}
        return blob | ({} if blob["oid"] in self.blobs else upload)

    def _tree(self, repo: Repo, name: str, branch: str, body: bytes) -> Any:
        files = repo.branches[branch]
        return [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)} for path, data in files.items()
        ]

    def _preupload(self, repo: Repo, name: str, branch: str, body: bytes) -> Any:
        files = repo.branches[branch]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _commit(self, repo: Repo, name: str, branch: str, body: bytes) -> Any:
        files = repo.branches[branch]
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        return {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _oid(path: str, data: bytes) -> str:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data)
    return hashlib.sha256(data).hexdigest() if _is_large(path) else git.hexdigest()


@contextmanager
def pushed_hub(token: str) -> Iterator[PushedHub]:
    """A server that accepts uploads with `token` and refuses all other requests."""
    state = PushedHub(token)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_authorized = self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {state.token}"
            status, value = (
                state.answer(self.command, self.path.split("?")[0], body)
                if is_authorized
                else (401, {"error": "Invalid username or password."})
            )
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with _served(Handler) as address:
        state.address = address
        yield state
