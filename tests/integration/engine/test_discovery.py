"""Which Ray a run joins: heads that answer in all the ways that heads do, and what stands in for one and is none."""

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray._private.utils import validate_socket_filepath
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from pipeline.engine.ray_backend import connection, discovery
from pipeline.errors import ClusterError

OURS = {"ray_version": ray.__version__, "python_version": platform.python_version(), "ray_init_cluster": False}


_reply: Any = gcs_service_pb2.InternalKVGetReply  # type: ignore[attr-defined]


class FakeHead(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    """Answers `about` to clients with `token`."""

    def __init__(self, about: dict[str, Any], token: str | None) -> None:
        self._about, self._token = about, token

    def InternalKVGet(self, request: Any, context: Any) -> Any:
        if self._token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self._token}":
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token is missing or incorrect"
            )
        return _reply(value=json.dumps(self._about).encode())


@contextmanager
def head(token: str | None = None, **about: Any) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(FakeHead({**OURS, **about}, token), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray on this machine but for those of a test."""
    monkeypatch.setattr(discovery, "_owners", dict)
    monkeypatch.setattr(discovery, "read_ray_address", lambda folder: None)
    monkeypatch.setattr(discovery, "_QUERY_SECONDS", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def found(monkeypatch: pytest.MonkeyPatch, *there: str, recorded: str | None = None) -> tuple[str | None, list[str]]:
    lines: list[str] = []
    monkeypatch.setattr(discovery, "_owners", lambda: dict.fromkeys(there, os.getuid()))
    monkeypatch.setattr(discovery, "read_ray_address", lambda folder: recorded)
    return discovery.find_local_cluster(lines.append), lines


def test_a_cluster_of_ray_start_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with head() as address:
        assert found(monkeypatch, address, recorded=address) == (address, [])
        discovery.require_joinable(address)


def test_the_private_cluster_of_another_program_is_never_used_nor_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(ray_init_cluster=True) as address:
        assert found(monkeypatch, address) == (None, [])
        with pytest.raises(ClusterError, match="ends with it"):
            discovery.require_joinable(address)


def test_a_shared_one_is_found_beside_private_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(ray_init_cluster=True) as private, head() as shared:
        assert found(monkeypatch, private, shared) == (shared, [])


def test_what_a_killed_cluster_left_behind_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    address, lines = found(monkeypatch, recorded="127.0.0.1:9")
    assert address is None
    assert len(lines) == 1
    assert "127.0.0.1:9" in lines[0]


@contextmanager
def silent() -> Iterator[str]:
    """A port whose server never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_one_that_hangs_is_given_up_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as address:
        started = time.monotonic()
        assert found(monkeypatch, address)[0] is None
        with pytest.raises(ClusterError, match="no answer"):
            discovery.require_joinable(address)
        assert time.monotonic() - started < 5


def test_one_of_another_user_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    monkeypatch.setattr(discovery, "_owners", lambda: {"127.0.0.1:9": 1234})
    lines: list[str] = []
    assert discovery.find_local_cluster(lines.append) is None
    assert "another user" in lines[0]


@pytest.mark.parametrize("versions", [{"ray_version": "2.1.0"}, {"python_version": "3.8.1"}])
def test_one_of_other_versions_is_passed_over_or_refused(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    with head(**versions) as address:
        address_found, lines = found(monkeypatch, address, recorded=address)
        assert address_found is None
        assert next(iter(versions.values())) in lines[0]
        with pytest.raises(ClusterError, match=next(iter(versions.values()))):
            discovery.require_joinable(address)


def test_a_missing_token_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(token="secret") as address:
        with pytest.raises(discovery.TokenRefused, match="RAY_AUTH_MODE=token"):
            discovery.require_joinable(address)
        with pytest.raises(discovery.TokenRefused, match="RAY_AUTH_MODE=token"):
            found(monkeypatch, recorded=address)
        assert found(monkeypatch, address)[0] is None, "one that was not made by the last `ray start` is left alone"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"", b"\0" * 64])
def test_a_server_that_is_no_head_is_reported_as_none(answer: bytes) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            for _ in range(3):
                try:
                    one, _ = listener.accept()
                except OSError:
                    return
                with one:
                    one.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ClusterError, match="no Ray cluster"):
            discovery.query_head(f"127.0.0.1:{listener.getsockname()[1]}")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("about", [b"", b"[]", b"{}", b"\xff"])
def test_a_head_with_a_malformed_answer_is_none(monkeypatch: pytest.MonkeyPatch, about: bytes) -> None:
    reply = _reply(value=about)
    monkeypatch.setattr(FakeHead, "InternalKVGet", lambda self, request, context: reply)
    with head() as address, pytest.raises(ClusterError, match="no Ray cluster"):
        discovery.query_head(address)


@pytest.mark.parametrize(
    "address",
    [
        "auto", "http://127.0.0.1:8265", "127.0.0.1:9", "ray://127.0.0.1:9", "[::1]:9", "127.0.0.1", "host", ":6379",
        "auto ", "ray://host",
        "127.0.0.1:99999",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused_at_once(address: str) -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster|dashboard"):
        connection.joinable(address)


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "find_local_cluster", lambda on_skip: None)
    assert connection.joinable("") is None


def test_a_temporary_folder_whose_name_is_too_long_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of a batch system is passed over with a note; the one that is chosen for Ray is refused."""
    given: list[dict[str, object]] = []
    monkeypatch.setattr("pipeline.engine.ray_backend.connection.joinable", lambda where: None)
    monkeypatch.setattr("pipeline.engine.ray_backend.connection._init", lambda address, **more: given.append(more))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    connection.connect(None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 12)))
    connection.connect(None)
    assert [more.get("_temp_dir") for more in given] == [None, "/tmp/ray"]
    assert "RAY_TMPDIR" in capsys.readouterr().err
    monkeypatch.setattr("os.getpid", lambda: 12345)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 12)))
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR: .* too long .* at most 41 bytes"):
        connection.connect(None)


def test_a_temporary_folder_of_which_sockets_just_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray accepts it, with what it adds: its session is named by the number of the driver's process."""
    given: list[dict[str, object]] = []
    monkeypatch.setattr("pipeline.engine.ray_backend.connection.joinable", lambda where: None)
    monkeypatch.setattr("pipeline.engine.ray_backend.connection._init", lambda address, **more: given.append(more))
    monkeypatch.setattr("os.getpid", lambda: 12345)
    folder = "/" + "t" * 40
    validate_socket_filepath(f"{folder}/ray/session_2026-01-01_00-00-00_000000_12345/sockets/plasma_store")
    with pytest.raises(OSError, match="cannot exceed"):
        validate_socket_filepath(f"{folder}t/ray/session_2026-01-01_00-00-00_000000_12345/sockets/plasma_store")
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, folder)
        connection.connect(None)
    assert given == [{"include_dashboard": False}] * 2
