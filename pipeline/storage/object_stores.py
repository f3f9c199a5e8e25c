"""An object store through pyarrow: what is read and written there is checked, and a short refusal is waited for.

Endpoint, region and credentials come from the environment or from the client's own configuration files, and are never written
anywhere.
"""

import base64
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import StoreError, StoreOutage, StoreUnavailable
from pipeline.storage.etag import EtagDigest, etag_matches
from pipeline.storage.files import BytesLike, read_fully
from pipeline.storage.repeated_reads import ReadsDiffer, confirm_by_rereading

_ATTEMPTS = 6  # of one request, with growing pauses and jitter between them
_CONNECT_SECONDS, _REQUEST_SECONDS = 10.0, 60.0
_RETRY_TIME = timedelta(seconds=60)  # of a request to Google's store, whose client counts time in place of attempts
READ_ONCE = "SWSC_READ_ONCE"  # set: what comes over plain http is not read a second time
_LISTINGS = 7  # of a folder over plain http, until two in a row are equal
_PAUSE = 1.0  # seconds before a request is made anew that has failed in spite of these attempts
# What clients call a request whose credentials are wrong, expired, or of a clock that goes wrong.
_REFUSALS = (
    "ACCESS_DENIED", "AccessDenied", "HTTP status 403", "Forbidden", "ExpiredToken", "EXPIRED_TOKEN", "InvalidToken",
    "INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH",
    "SignatureDoesNotMatch", "REQUEST_TIME_TOO_SKEWED", "RequestTimeTooSkewed", "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip


# And one that may succeed when it is repeated: network, a store that is overloaded, and an answer that is none.
_FAILURES = (
    "curlCode", "NETWORK_CONNECTION", "HTTP status 5", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT", "XML_ERROR", "UNAVAILABLE", "DEADLINE_EXCEEDED",
)  # fmt: skip


class StoreNotResponding(StoreUnavailable):
    """The store does not answer, or not now."""


class CredentialsRefused(StoreUnavailable):
    """The store answers, and does not accept who asks."""


# Seconds without a success after which a failure ends the run.
PATIENCE: dict[type[StoreError], float] = {StoreNotResponding: 30.0, CredentialsRefused: 60.0}


class ObjectFiles:
    """An object store; folders are no more than beginnings of names."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._system = _connect(scheme)
        self._confirming = _is_plain(scheme) and not os.environ.get(READ_ONCE)
        self._accepted: set[tuple[str, str]] = set()  # what was done before, and to which bucket
        self._failing_since: float | None = None
        # Google's client fails for want of an object that stands for the folder; S3's would put one there instead.
        self._delete_folder = "delete_dir_contents" if scheme == "gs" else "delete_dir"

    def size(self, path: str) -> int | None:
        info = self._patiently(path, lambda: self._system.get_file_info(path))
        return int(info.size) if info.is_file else None

    def is_folder(self, path: str) -> bool:
        return bool(self.children(path))

    def children(self, path: str) -> dict[str, bool]:
        found = [self._patiently(path, partial(self._list, path))]
        while self._confirming and len(found) < _LISTINGS and found[-1:] != found[-2:-1]:
            found.append(self._patiently(path, partial(self._list, path)))
        if not self._confirming or found[-1] == found[-2]:
            return found[-1]
        # Others write there all the time, or names are spoiled: what most listings hold is there.
        counts = Counter(chain.from_iterable(one.items() for one in found))
        return dict(entry for entry, count in counts.items() if 2 * count > len(found))

    def _list(self, path: str) -> dict[str, bool]:
        from pyarrow.fs import FileSelector

        # Google's client names no folders, and asks for all that is below in any case: they are seen by what is in them.
        selector = FileSelector(path, allow_not_found=True, recursive=self._scheme == "gs")
        found = {}
        for info in self._system.get_file_info(selector):
            name, _, below = info.path.removeprefix(f"{path}/").partition("/")
            found[name] = info.is_file and not below
        return found

    def read(self, path: str, start: int, length: int) -> bytearray:
        try:
            return self._patiently(path, partial(self._read, path, start, length))
        except ReadsDiffer as where:
            raise StoreError(
                f"{self._scheme}://{path}: bytes from {where} on differ from reading to reading; {_HTTPS}"
            ) from None

    def _read(self, path: str, start: int, length: int) -> bytearray:
        with self._system.open_input_file(path) as file:
            size = file.size()

            def between(first: int, last: int) -> bytearray:
                file.seek(first)
                return read_fully(last - first, file.readinto)

            data = between(start, min(start + length, size))
            if self._confirming and not (len(data) == size and etag_matches(_etag(file), data)):
                confirm_by_rereading(data, start, size, between)
            return data

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        out = self._patiently(path, lambda: self._system.open_output_stream(path), "write")
        try:
            for piece in pieces:
                self._try(path, out.write, memoryview(piece).cast("B"))
        except BaseException:
            with suppress(OSError):
                out.close()  # which completes what was sent, as would the end of `out`
            with suppress(StoreError):
                self.remove(path)
            raise
        try:
            self._try(path, out.close)  # if this fails nothing has appeared, and what was there before is there still
        except CredentialsRefused:
            self.size(path)  # returns when they are accepted again, so that whoever writes it anew finds them so
            raise

    def create(self, path: str, data: bytes) -> bool:
        self.write(path, [data])
        return True

    def locked(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def remove(self, path: str) -> None:
        if self.size(path) is not None:
            self._patiently(path, lambda: self._system.delete_file(path), "write")
        elif self.children(path):
            self._patiently(path, lambda: getattr(self._system, self._delete_folder)(path), "write")

    def remove_empty(self, path: str) -> None:
        pass  # there are no folders

    def free_bytes(self, path: str) -> int | None:
        return None

    def content_proved(self, path: str, digest: EtagDigest) -> bool:
        """Whether the store's own checksum of an object is one of the bytes that `digest` has seen."""
        return self._patiently(path, partial(self._etag_of, path)) in digest.etags

    def _etag_of(self, path: str) -> str:
        with self._system.open_input_file(path) as file:
            return _etag(file).strip('"')

    def _patiently(self, path: str, call: Callable[[], Any], kind: str = "read") -> Any:
        """`_try`, again for a while if the store has allowed the like before: it may come up again, and credentials be renewed."""
        like = kind, path.partition("/")[0]
        while True:
            try:
                result = self._try(path, call)
            except (StoreNotResponding, CredentialsRefused) as error:
                self._failing_since = self._failing_since or time.monotonic()
                seconds = time.monotonic() - self._failing_since
                if like not in self._accepted:
                    raise
                if seconds >= PATIENCE[type(error)]:
                    raise StoreOutage(
                        f"{error} (no good answer for {seconds:.0f} s; what is finished is kept: run it again when the store is back)"
                    ) from None
                time.sleep(_PAUSE)
                if isinstance(error, CredentialsRefused):
                    self._system = _connect(self._scheme)  # a client holds the credentials that it was made with
            else:
                self._failing_since = None
                self._accepted.add(like)
                return result

    def _try(self, path: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the client; what it raises becomes one line that names the object."""
        try:
            return call(*arguments)
        except (OSError, ValueError) as error:  # ArrowInvalid is one of the latter
            said = " ".join(str(error).split())
            reason, own = f"{self._scheme}://{path}: {said}", said.replace(path.partition("/")[2], "")
        if any(word in own for word in _REFUSALS):
            raise CredentialsRefused(
                f"{reason}: the store refuses these credentials; renew them, or give others by the environment, and run the same"
                " command again"
            )
        kind = StoreNotResponding if any(word in own for word in _FAILURES) else StoreError
        raise kind(f"{reason}; check the address, and endpoint, region and credentials in the environment")


_HTTPS = "what lies between corrupts what it carries: use an https endpoint, or repair it"


def _etag(file: Any) -> str:
    """A checksum of the whole object that an open file's store tells, in the form of an ETag; "" if it tells none."""
    about = {key: bytes(value).decode() for key, value in file.metadata().items()}
    if "md5Hash" in about:  # Google's name of it
        return base64.b64decode(about["md5Hash"]).hex()
    return about.get("ETag", "")


def _endpoint(scheme: str) -> str:
    """Address of a store that is not the scheme's own; "" if it is."""
    if scheme == "gs":
        return os.environ.get("STORAGE_EMULATOR_HOST", "")  # as Google's own clients have it
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _is_plain(scheme: str) -> bool:
    """Whether what is read travels without the checksums that TLS gives each record."""
    return _endpoint(scheme).lower().startswith("http://")


def _connect(scheme: str) -> Any:
    import pyarrow.fs as arrow

    if scheme == "gs":
        emulator = urlsplit(_endpoint(scheme))
        instead = {"anonymous": True, "scheme": emulator.scheme, "endpoint_override": emulator.netloc}
        return arrow.GcsFileSystem(retry_time_limit=_RETRY_TIME, **(instead if emulator.netloc else {}))
    endpoint = _endpoint(scheme) or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    return arrow.S3FileSystem(
        endpoint_override=endpoint, region=region,
        retry_strategy=arrow.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS, request_timeout=_REQUEST_SECONDS,
    )  # fmt: skip
