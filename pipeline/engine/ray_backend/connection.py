"""Connection to Ray: a run uses the cluster at an address or one that is shared on this machine, or starts its own."""

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray.exceptions import RayError

from pipeline.console import log
from pipeline.engine import signals
from pipeline.engine.ray_backend.discovery import find_local_cluster, require_joinable
from pipeline.engine.ray_backend.import_path import import_path_options
from pipeline.errors import ClusterError

_CONNECT_SECONDS = 10.0
# The system's limit for the path of a socket, in bytes.
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
# The longest path of a socket in Ray's temporary folder; it contains the driver's pid.
_SOCKET = "/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
# Address of a head, or of a server of Ray Client.
_ADDRESS = re.compile(r"(ray://)?(\[[\da-fA-F:.%]+\]|[^\s:/\[\]][^\s/\[\]]*):\d{1,5}(/\S*)?")


def connect(address: str | None) -> bool:
    """Connect to the cluster at `address`, or to a shared one of this machine, or start one.

    Returns:
        True if a cluster was started.

    Raises:
        ClusterError: the cluster does not accept this process, or cannot be started.
    """
    signals.raise_if_interrupted()
    signals.install_handlers()
    import_path = import_path_options(_working_directory())
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        existing = joinable(address)
        if existing:
            # Under Ray Client the driver runs on the cluster, so workers get no directory of this machine.
            _init(existing, **({} if existing.startswith("ray://") else import_path))
        else:
            with signals.deferred(), _loopback_only():
                _init("local", include_dashboard=False, **import_path, **_temporary())
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"no Ray cluster at {address or 'this machine'}: {reason}; check --address, RAY_ADDRESS and RAY_AUTH_MODE,"
            " or start one by --address local"
        ) from None
    return not existing


def _temporary() -> dict[str, str]:
    """Return arguments of `ray.init` for the folder of a new cluster's sockets.

    Ray's own choice holds unless it makes the sockets' paths too long for the system; then they go to /tmp/ray.

    Raises:
        ClusterError: RAY_TMPDIR is too long.
    """
    folder = get_default_ray_temp_dir()
    longest = _LONGEST_SOCKET - len(_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder)) <= longest:
        return {}
    if "RAY_TMPDIR" in os.environ:
        raise ClusterError(
            f"RAY_TMPDIR: {folder} is too long for the paths of Ray's sockets; use a path of at most"
            f" {longest - len('/ray')} bytes"
        )
    log(
        f"note: {folder} (TMPDIR) is too long for the paths of Ray's sockets, so Ray uses /tmp/ray; set RAY_TMPDIR to"
        " use another folder"
    )
    return {"_temp_dir": "/tmp/ray"}


def _working_directory() -> Path:
    """Return the working directory.

    Raises:
        ClusterError: it was removed. That happens when nodes that share a --temp-dir unpack the package of a job again.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ClusterError("the working directory was removed; run the command, or submit the job, again") from None


def joinable(address: str | None) -> str | None:
    """Return the address of the cluster to join; None if one has to be started.

    Args:
        address: "local", "auto", an address, or None. An empty string, as of a variable that is set to nothing, counts
            as None.

    Raises:
        ClusterError: this process cannot join the requested cluster, or `address` is not an address.
    """
    if address == "local":
        return None
    if not address:
        return find_local_cluster(log)
    if address == "auto":
        if local_cluster := find_local_cluster(log):
            return local_cluster
        raise ClusterError("no Ray cluster on this machine: start one by `ray start --head`, or remove --address")
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the address of a dashboard, for `ray job submit`; give the head's host:port, or remove"
            " --address"
        )
    if not _ADDRESS.fullmatch(address):
        raise ClusterError(
            f"no Ray cluster at {address!r}: expected host:port, auto or local; check --address and RAY_ADDRESS"
        )
    _require_listener(address)
    if "://" not in address:
        require_joinable(address)
    return address


def _init(address: str, **more: Any) -> None:
    """Call `ray.init`, and restore our signal handlers, which Ray replaces."""
    try:
        with _without_sigterm_handler():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    finally:
        # Ray's C++ part also installs a handler, which ends the process with a stack trace.
        signals.install_handlers()
        signals.raise_if_interrupted()


@contextlib.contextmanager
def _without_sigterm_handler() -> Iterator[None]:
    """Keep Ray from installing its handler of SIGTERM, which exits at any point, with the signal as the exit code."""
    real = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = real


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a cluster that is started in this context listen on loopback only, because its ports require no token.

    Ray replaces a loopback address by the machine's own, unless clusters of several machines are switched off. Ray's
    processes read that switch from the environment; this process has already read it into a constant of Ray.
    """
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        del os.environ[name]
        if before[0] is not None:
            os.environ[name] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


def _require_listener(address: str) -> None:
    """Raise ClusterError if nothing listens at host:port.

    Ray itself would retry for minutes and then end the process.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClusterError(f"no Ray cluster at {address}: {reason}; check --address and RAY_ADDRESS") from None
