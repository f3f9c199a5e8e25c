"""Files in an object store, through pyarrow: reads and writes are verified, and short outages are waited for.

Endpoint, region and credentials come from the environment or from the configuration files of the client, and are never
written anywhere.
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
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import CredentialsRefused, StoreError, StoreNotResponding, StoreOutage
from pipeline.storage.etag import EtagDigest, etag_matches
from pipeline.storage.files import BytesLike, read_fully
from pipeline.storage.repeated_reads import ReadsDiffer, confirm_by_rereading

T = TypeVar("T")

# Attempts of the client for one request, with growing pauses and jitter between them.
_ATTEMPTS = 6
_CONNECT_SECONDS, _REQUEST_SECONDS = 10.0, 60.0
# Time for one request to Google's store, whose client limits time instead of attempts.
_RETRY_TIME = timedelta(seconds=60)
# Environment variable. If it is set, bytes that arrive over plain http are not read a second time.
READ_ONCE = "SWSC_READ_ONCE"
# Listings of a folder over plain http, at most, until two in a row are equal.
_LISTINGS = 7
# Seconds before a request that failed after all attempts of the client is repeated.
_PAUSE = 1.0
# Words in errors of the clients for credentials that are wrong or expired, and for a wrong clock.
_REFUSALS = (
    "ACCESS_DENIED",
    "AccessDenied",
    "HTTP status 403",
    "Forbidden",
    "ExpiredToken",
    "EXPIRED_TOKEN",
    "InvalidToken",
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "SignatureDoesNotMatch",
    "REQUEST_TIME_TOO_SKEWED",
    "RequestTimeTooSkewed",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
# Words for failures that a repetition may cure: the network, an overloaded store, an invalid answer.
_FAILURES = (
    "curlCode",
    "NETWORK_CONNECTION",
    "HTTP status 5",
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "XML_ERROR",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)


# Seconds without a successful request after which a failure ends the run.
PATIENCE: dict[type[StoreError], float] = {StoreNotResponding: 30.0, CredentialsRefused: 60.0}


class ObjectFiles:
    """Implements `Files` for an object store. Folders are prefixes of object names."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._system = _connect(scheme)
        self._confirming = _is_plain(scheme) and not os.environ.get(READ_ONCE)
        # Kinds of requests that a bucket has served before: (kind, bucket).
        self._accepted: set[tuple[str, str]] = set()
        self._failing_since: float | None = None
        # delete_dir of Google's client fails without an object for the folder; delete_dir_contents of S3's creates one.
        self._delete_folder = "delete_dir_contents" if scheme == "gs" else "delete_dir"

    def size(self, path: str) -> int | None:
        info = self._patiently(path, lambda: self._system.get_file_info(path))
        return int(info.size) if info.is_file else None

    def is_folder(self, path: str) -> bool:
        return bool(self.children(path))

    def children(self, path: str) -> dict[str, bool]:
        listings = [self._patiently(path, partial(self._list, path))]
        while self._confirming and len(listings) < _LISTINGS and listings[-1:] != listings[-2:-1]:
            listings.append(self._patiently(path, partial(self._list, path)))
        if not self._confirming or listings[-1] == listings[-2]:
            return listings[-1]
        # Other runs write there all the time, or names are damaged on the way: the majority of the listings decides.
        counts = Counter(chain.from_iterable(listing.items() for listing in listings))
        return dict(entry for entry, count in counts.items() if 2 * count > len(listings))

    def _list(self, path: str) -> dict[str, bool]:
        from pyarrow.fs import FileSelector

        # Google's client lists no folders, and requests everything below in any case: folders follow from their
        # contents.
        selector = FileSelector(path, allow_not_found=True, recursive=self._scheme == "gs")
        children = {}
        for info in self._system.get_file_info(selector):
            name, _, below = info.path.removeprefix(f"{path}/").partition("/")
            children[name] = info.is_file and not below
        return children

    def read(self, path: str, start: int, length: int) -> bytearray:
        try:
            return self._patiently(path, partial(self._read, path, start, length))
        except ReadsDiffer as first_byte:
            raise StoreError(
                f"{self._scheme}://{path}: repeated readings of the bytes from {first_byte} on differ;"
                f" {_DAMAGED_ON_THE_WAY}"
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
                out.close()  # completes the upload, as would the garbage collection of `out`
            with suppress(StoreError):
                self.remove(path)
            raise
        try:
            self._try(path, out.close)  # if this fails, the object is as it was before
        except CredentialsRefused:
            self.size(path)  # returns when credentials are accepted again, so that a retry of the caller can succeed
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
        """Whether the store's checksum of an object matches `digest`."""
        return self._patiently(path, partial(self._etag_of, path)) in digest.etags

    def _etag_of(self, path: str) -> str:
        with self._system.open_input_file(path) as file:
            return _etag(file).strip('"')

    def _patiently(self, path: str, call: Callable[[], T], kind: str = "read") -> T:
        """`_try`, repeated for a while if the bucket has served this kind of request before.

        The store may recover, and credentials may be renewed.
        """
        request = kind, path.partition("/")[0]
        while True:
            try:
                result = self._try(path, call)
            except (StoreNotResponding, CredentialsRefused) as error:
                self._failing_since = self._failing_since or time.monotonic()
                seconds = time.monotonic() - self._failing_since
                if request not in self._accepted:
                    raise
                if seconds >= PATIENCE[type(error)]:
                    raise StoreOutage(
                        f"{error} (no successful request for {seconds:.0f} s; finished work is kept: run the same"
                        " command again when the store is available)"
                    ) from None
                time.sleep(_PAUSE)
                if isinstance(error, CredentialsRefused):
                    self._system = _connect(self._scheme)  # a client keeps the credentials that it was created with
            else:
                self._failing_since = None
                self._accepted.add(request)
                return result

    def _try(self, path: str, call: Callable[..., T], *arguments: Any) -> T:
        """Call the client, and translate its errors into a StoreError of one line that names the object."""
        try:
            return call(*arguments)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            message = " ".join(str(error).split())
        reason = f"{self._scheme}://{path}: {message}"
        # The name of the object may contain any of the words.
        message = message.replace(path.partition("/")[2], "")
        if any(word in message for word in _REFUSALS):
            raise CredentialsRefused(
                f"{reason}: the store refuses these credentials; renew them, or set others in the environment, and run"
                " the same command again"
            )
        kind = StoreNotResponding if any(word in message for word in _FAILURES) else StoreError
        raise kind(f"{reason}; check the address, and endpoint, region and credentials in the environment")


_DAMAGED_ON_THE_WAY = "the connection to the store damages data; use an https endpoint, or repair the connection"


def _etag(file: Any) -> str:
    """Return the store's checksum of an open object, in the form of an ETag; "" if the store has none."""
    metadata = {key: bytes(value).decode() for key, value in file.metadata().items()}
    if "md5Hash" in metadata:  # Google's store
        return base64.b64decode(metadata["md5Hash"]).hex()
    return metadata.get("ETag", "")


def _endpoint(scheme: str) -> str:
    """Return the endpoint from the environment; "" for the default endpoint of the scheme."""
    if scheme == "gs":
        return os.environ.get("STORAGE_EMULATOR_HOST", "")  # as in Google's own clients
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _is_plain(scheme: str) -> bool:
    """Whether reads use plain http, without the checksums of TLS."""
    return _endpoint(scheme).lower().startswith("http://")


def _connect(scheme: str) -> Any:
    import pyarrow.fs as arrow

    if scheme == "gs":
        emulator = urlsplit(_endpoint(scheme))
        options = {"anonymous": True, "scheme": emulator.scheme, "endpoint_override": emulator.netloc}
        return arrow.GcsFileSystem(retry_time_limit=_RETRY_TIME, **(options if emulator.netloc else {}))
    endpoint = _endpoint(scheme) or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    return arrow.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        retry_strategy=arrow.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
    )
