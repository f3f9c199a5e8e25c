"""How a run gets its Ray: it joins a cluster that was named or that is shared on this machine, or starts one of its own."""

import contextlib
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

import pipeline
from pipeline.console import log
from pipeline.engine import signals
from pipeline.engine.ray_backend.discovery import found_here, require_joinable
from pipeline.errors import ClusterError

_CONNECT_SECONDS = 10.0
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of a socket's name that the system takes
_SOCKET = (
    "/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest in Ray's folder, named by the driver
)
_ADDRESS = re.compile(
    r"(ray://)?(\[[\da-fA-F:.%]+\]|[^\s:/\[\]][^\s/\[\]]*):\d{1,5}(/\S*)?"
)  # of a head, or of Ray Client's server
_PACKAGES = ("pipeline", "swsc_core")  # that workers import


def connect(address: str | None) -> bool:
    """Connect to the cluster named, to one of this machine, or start one; True if started here."""
    signals.raise_if_interrupted()
    signals.install_handlers()
    require_own_packages(_working_directory())
    if ray.is_initialized():
        return False
    where = address or os.environ.get("RAY_ADDRESS") or None
    try:
        joined = joinable(where)
        if joined:
            _init(joined)
        else:
            with signals.deferred(), _loopback_only():
                _init("local", include_dashboard=False, **_temporary())
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"no Ray cluster at {where or 'this machine'}: {reason}; check --address, RAY_ADDRESS and RAY_AUTH_MODE, or start"
            " one by --address local"
        ) from None
    return not joined


def _temporary() -> dict[str, str]:
    """Where a cluster that is started keeps its sockets: Ray's own choice, or /tmp where that makes their names too long for the system.

    Raises:
        ClusterError: RAY_TMPDIR is too long.
    """
    folder = get_default_ray_temp_dir()
    longest = _LONGEST_SOCKET - len(_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder)) <= longest:
        return {}
    if "RAY_TMPDIR" in os.environ:
        raise ClusterError(
            f"RAY_TMPDIR: {folder} is too long for the names of Ray's sockets; give one of at most {longest - len('/ray')} bytes"
        )
    log(
        f"note: {folder} (TMPDIR) is too long for the names of Ray's sockets, it uses /tmp/ray; RAY_TMPDIR chooses another"
    )
    return {"_temp_dir": "/tmp/ray"}


def _working_directory() -> Path:
    """Where the command runs; ClusterError if it was removed: a node that shares its --temp-dir with another unpacks a job's package anew."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ClusterError("the working directory was removed; run the command, or submit the job, again") from None


def require_own_packages(folder: Path) -> None:
    """Raise ClusterError if `folder`, the working directory, where workers look first, hides this tool's packages from them."""
    home = Path(pipeline.__file__).resolve().parents[1]
    names = [found for name in _PACKAGES for found in (folder / name / "__init__.py", folder / f"{name}.py")]
    if folder.resolve() != home and (there := [name for name in names if name.exists()]):
        raise ClusterError(
            f"Ray's workers would take {there[0]} for this tool's own: rename it, or run the command from another directory"
            " or with --local"
        )


def joinable(where: str | None) -> str | None:
    """Address of the cluster to be joined; None to start one. An empty address, as of a variable that is set to nothing, is none.

    Raises:
        ClusterError: one that was asked for and cannot be joined, or what is no address.
    """
    where = where or None
    if where == "local":
        return None
    if where is None:
        return found_here(log)
    if where == "auto":
        if found := found_here(log):
            return found
        raise ClusterError("no Ray cluster on this machine: start one by `ray start --head`, or leave --address out")
    if where.startswith(("http://", "https://")):
        raise ClusterError(
            f"{where} is a dashboard's address, for `ray job submit`: give the head's own, host:port, or leave --address out"
        )
    if not _ADDRESS.fullmatch(where):
        raise ClusterError(
            f"no Ray cluster at {where!r}: wanted host:port, auto or local; check --address and RAY_ADDRESS"
        )
    _require_listener(where)
    if "://" not in where:
        require_joinable(where)
    return where


def _init(address: str, **more: Any) -> None:
    """`ray.init`, and handlers of signals as they were before: Ray puts its own in their place."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with _no_handler_of_rays():
            ray.init(address=address, **quiet, **more)
    finally:
        signals.install_handlers()  # its C++ part puts one there, too, that ends the process with a stack trace
        signals.raise_if_interrupted()


@contextlib.contextmanager
def _no_handler_of_rays() -> Iterator[None]:
    """Ray's own handler of SIGTERM ends the process wherever it is, with the number of the signal as its exit code."""
    real = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = real


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A cluster that is started now is out of reach for other machines: its ports ask for no token.

    Ray replaces a loopback address by the machine's own wherever it may build clusters of several machines; that it may not
    here is said to its processes by the environment, and to this one, which has read it already, by Ray's constant.
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
    """Raise ClusterError if nobody listens at host:port: Ray itself would try for minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClusterError(f"no Ray cluster at {address}: {reason}; check --address and RAY_ADDRESS") from None
