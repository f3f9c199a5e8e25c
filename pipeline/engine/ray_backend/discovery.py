"""Ray clusters that a run may join: what the head of one says of itself, and which there are on this machine.

Ray itself tries for minutes to join a cluster that does not answer, refuses the token, or listens where it does not look. So the head
is asked first, in one request with a deadline.
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

_ASK_SECONDS = 5.0
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_OWN = "or start one of this run's own by --address local"
_BY = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


class TokenRefused(ClusterError):
    """A cluster that is there and does not let this command in."""


@dataclass(frozen=True)
class Head:
    """What the head of a cluster says of it.

    Attributes:
        private: `ray.init` has started it; it ends with the program that did, and is that program's own.
        other_versions: what it runs, if that is not what this process runs; "" if it is.
    """

    address: str
    private: bool
    other_versions: str


def ask(address: str) -> Head:
    """Ask the head of the cluster at host:port.

    Raises:
        TokenRefused: it wants another token than the one that this process sends, or one at all.
        ClusterError: nobody answers there within seconds, or somebody who is not the head of a Ray cluster.
    """
    try:
        with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            request = InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
            answer = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=_ASK_SECONDS)
        about = json.loads(answer.value)
        return Head(address, bool(about.get("ray_init_cluster")), _other_versions(about))
    except AuthenticationError:
        raise TokenRefused(
            f"RAY_AUTH_MODE is token and there is no token for the Ray cluster at {address}: give it by {_BY}, or set"
            f" RAY_AUTH_MODE=disabled if that cluster asks for none, {_OWN}"
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
            f"the Ray cluster at {address} refuses the token that this command sends: give that cluster's own by {_BY}, {_OWN}"
        )
    if code in _REFUSED:
        return TokenRefused(
            f"the Ray cluster at {address} demands a token and this command sends none: set RAY_AUTH_MODE=token and give the"
            f" token by {_BY}, {_OWN}"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ClusterError(
            f"no head of a Ray cluster at {address}: something else answers there; give the head's own port, 6379 unless it"
            f" was started with another, {_OWN}"
        )
    why = f"no answer within {_ASK_SECONDS:.0f} s" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "it is not reached"
    return ClusterError(f"no Ray cluster at {address}: {why}; check --address and RAY_ADDRESS, {_OWN}")


def _other_versions(about: dict[str, Any]) -> str:
    try:
        check_version_info(about, "this machine")
    except RuntimeError:
        return f"Ray {about.get('ray_version')} with Python {about.get('python_version')}"
    return ""


def _unlike(head: Head) -> str:
    own = f"Ray {ray.__version__} with Python {platform.python_version()}"
    return f"the Ray cluster at {head.address} runs {head.other_versions}, this command {own}"


def require_joinable(address: str) -> None:
    """Raise ClusterError if a run that was told to join the cluster at host:port cannot."""
    # Ray puts the machine's own address in the place of a loopback one: it is there that it must be listening.
    for place in dict.fromkeys([address, services.canonicalize_bootstrap_address(address) or address]):
        head = ask(place)
        if head.private:
            raise ClusterError(
                f"the Ray cluster at {address} is another program's own and ends with it: leave --address out to start one of this"
                " run's own, or start one to share by `ray start --head`"
            )
        if head.other_versions:
            raise ClusterError(f"{_unlike(head)}: use an environment with the cluster's versions, {_OWN}")


def found_here(tell: Callable[[str], None]) -> str | None:
    """Address of a cluster that `ray start` has made on this machine and that this process may join; None if there is none.

    `tell` gets a line on each one that is passed over, but for those that other programs have started for themselves.

    Raises:
        TokenRefused: the one that the last `ray start` has made wants a token.
    """
    owners = _owners()
    recorded = read_ray_address(None)  # by the last `ray start`; nobody removes it if that cluster is killed
    for address in dict.fromkeys([*([recorded] if recorded else []), *sorted(owners)]):
        try:
            reason = _passed_over(address, owners.get(address))
        except TokenRefused as refused:
            if address == recorded:
                raise
            reason = str(refused).partition(":")[0]
        if reason is None:
            return address
        if reason:
            tell(f"note: {reason}; not joined")
    return None


def _passed_over(address: str, owner: int | None) -> str | None:
    """Why a cluster is not joined, "" for one that is nobody's business; None if it may be."""
    if owner not in (None, os.getuid()) and os.getuid() != 0:
        return f"the Ray cluster at {address} belongs to another user"
    try:
        head = ask(address)
    except TokenRefused:
        raise
    except ClusterError as error:
        return str(error).partition(";")[0] if owner is None else f"the Ray cluster at {address} does not answer"
    if head.private:
        return ""
    return _unlike(head) if head.other_versions else None


def _owners() -> dict[str, int]:
    """Address of each cluster that has a node on this machine -> user of that node's process."""
    import psutil  # Ray brings it along

    found: dict[str, int] = {}
    for process in psutil.process_iter(["name", "cmdline", "uids"]):
        about = process.info
        if about["name"] != "raylet" or not about["cmdline"]:
            continue
        words = [word for argument in about["cmdline"] for word in argument.split()]
        for word in words:
            if word.startswith("--gcs-address="):
                found[word.partition("=")[2]] = about["uids"].real if about["uids"] else os.getuid()
    return found
