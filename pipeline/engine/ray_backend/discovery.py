"""Discovery of Ray clusters: a query to the head of a cluster, and a search for clusters on this machine.

Ray itself retries for minutes to join a cluster that does not answer, refuses the token, or listens at another address.
Therefore the head is queried first, in one request with a deadline.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import check_version_info, read_ray_address
from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
from ray.exceptions import AuthenticationError

from pipeline.errors import ClusterError

_QUERY_SECONDS = 5.0
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_START_ONE = "or start a cluster for this run alone by --address local"
_TOKEN_SOURCES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


class TokenRefused(ClusterError):
    """A cluster that answers, but refuses the token of this command."""


@dataclass(frozen=True)
class Head:
    """Description of a cluster by its head.

    Attributes:
        address: host:port.
        private: another program started it by `ray.init`; it ends with that program.
        other_versions: versions of Ray and Python, if they differ from those of this process; else "".
    """

    address: str
    private: bool
    other_versions: str


def query_head(address: str) -> Head:
    """Query the head of the cluster at host:port.

    Raises:
        TokenRefused: it requires a token, and this process sends none or another one.
        ClusterError: nothing answers within seconds, or what answers is not the head of a Ray cluster.
    """
    try:
        with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            request = InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
            answer = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=_QUERY_SECONDS)
        metadata = json.loads(answer.value)
        return Head(address, bool(metadata.get("ray_init_cluster")), _other_versions(metadata))
    except AuthenticationError:
        raise TokenRefused(
            f"RAY_AUTH_MODE is token, but there is no token for the Ray cluster at {address}: give it by"
            f" {_TOKEN_SOURCES}, set RAY_AUTH_MODE=disabled if that cluster requires none, {_START_ONE}"
        ) from None
    except grpc.RpcError as error:
        raise _no_answer(address, error) from None
    except (ValueError, KeyError, AttributeError):
        raise ClusterError(
            f"no Ray cluster at {address}: what answers there is not the head of one; check --address"
        ) from None


def _no_answer(address: str, error: grpc.RpcError) -> ClusterError:
    code = error.code() if isinstance(error, grpc.Call) else None
    if code in _REFUSED and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return TokenRefused(
            f"the Ray cluster at {address} refuses the token that this command sends: give that cluster's token by"
            f" {_TOKEN_SOURCES}, {_START_ONE}"
        )
    if code in _REFUSED:
        return TokenRefused(
            f"the Ray cluster at {address} requires a token, but this command sends none: set RAY_AUTH_MODE=token and"
            f" give the token by {_TOKEN_SOURCES}, {_START_ONE}"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ClusterError(
            f"no head of a Ray cluster at {address}: something else answers there; give the port of the head, which is"
            f" 6379 unless it was started with another, {_START_ONE}"
        )
    timed_out = code is grpc.StatusCode.DEADLINE_EXCEEDED
    reason = f"no answer within {_QUERY_SECONDS:.0f} s" if timed_out else "it cannot be reached"
    return ClusterError(f"no Ray cluster at {address}: {reason}; check --address and RAY_ADDRESS, {_START_ONE}")


def _other_versions(metadata: Any) -> str:
    """Versions in the metadata of a cluster, which is JSON of Ray; "" if they fit this process."""
    try:
        check_version_info(metadata, "this machine")
    except RuntimeError:
        return f"Ray {metadata.get('ray_version')} with Python {metadata.get('python_version')}"
    return ""


def _describe_mismatch(head: Head) -> str:
    versions = f"Ray {ray.__version__} with Python {platform.python_version()}"
    return f"the Ray cluster at {head.address} runs {head.other_versions}, this command {versions}"


def require_joinable(address: str) -> None:
    """Raise ClusterError if this process cannot join the cluster at host:port."""
    # Ray replaces a loopback address by the machine's own, so the head must listen there as well.
    for candidate in dict.fromkeys([address, services.canonicalize_bootstrap_address(address) or address]):
        head = query_head(candidate)
        if head.private:
            raise ClusterError(
                f"the Ray cluster at {address} belongs to another program and ends with it: remove --address to start a"
                " cluster for this run alone, or start one to share by `ray start --head`"
            )
        if head.other_versions:
            raise ClusterError(
                f"{_describe_mismatch(head)}: use an environment with the cluster's versions, {_START_ONE}"
            )


def find_local_cluster(on_skip: Callable[[str], None]) -> str | None:
    """Return the address of a cluster that `ray start` has started on this machine, or None.

    Clusters that this process cannot join are skipped.

    Args:
        on_skip: called with a line for each cluster that is skipped, except for private ones of other programs.

    Raises:
        TokenRefused: the cluster of the last `ray start` requires a token.
    """
    owners = _owners()
    # Recorded by the last `ray start`. The record remains if that cluster is killed.
    recorded = read_ray_address(None)
    for address in dict.fromkeys([*([recorded] if recorded else []), *sorted(owners)]):
        try:
            reason = _why_skipped(address, owners.get(address))
        except TokenRefused as refused:
            if address == recorded:
                raise
            reason = str(refused).partition(":")[0]
        if reason is None:
            return address
        if reason:
            on_skip(f"note: {reason}; this run does not use it")
    return None


def _why_skipped(address: str, owner: int | None) -> str | None:
    """Why a cluster is skipped: "" for a private one, which needs no note; None if this process can join it."""
    if owner not in (None, os.getuid()) and os.getuid() != 0:
        return f"the Ray cluster at {address} belongs to another user"
    try:
        head = query_head(address)
    except TokenRefused:
        raise
    except ClusterError as error:
        return str(error).partition(";")[0] if owner is None else f"the Ray cluster at {address} does not answer"
    if head.private:
        return ""
    return _describe_mismatch(head) if head.other_versions else None


def _owners() -> dict[str, int]:
    """Address of each cluster that has a node on this machine -> user id of that node's process."""
    # psutil is a dependency of Ray.
    import psutil

    owners: dict[str, int] = {}
    for process in psutil.process_iter(["name", "cmdline", "uids"]):
        info = process.info
        if info["name"] != "raylet" or not info["cmdline"]:
            continue
        words = [word for argument in info["cmdline"] for word in argument.split()]
        for word in words:
            if word.startswith("--gcs-address="):
                owners[word.partition("=")[2]] = info["uids"].real if info["uids"] else os.getuid()
    return owners
