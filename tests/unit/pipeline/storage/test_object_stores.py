"""Checksums that object stores report for written objects, in the formats of their clients."""

import base64
import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.storage import object_stores as object_files
from pipeline.storage.etag import EtagDigest
from pipeline.storage.object_stores import ObjectFiles

CONTENT = b"content" * 100
MD5 = hashlib.md5(CONTENT)


class _System:
    """A client, as far as an object is asked for what is known of it; an error is raised in place of that."""

    def __init__(self, about: dict[str, str] | Exception) -> None:
        self._about = about

    def open_input_file(self, path: str) -> AbstractContextManager["_System"]:
        return nullcontext(self)

    def metadata(self) -> dict[str, bytes]:
        if isinstance(self._about, Exception):
            raise self._about
        return {key: value.encode() for key, value in self._about.items()}


def proved(scheme: str, about: dict[str, str] | Exception, monkeypatch: pytest.MonkeyPatch) -> bool:
    def connected(_: str) -> Any:
        return _System(about)

    monkeypatch.setattr(object_files, "_connect", connected)
    digest = EtagDigest()
    digest.update(CONTENT)
    return ObjectFiles(scheme).content_proved("bucket/file", digest)


@pytest.mark.parametrize(
    ("scheme", "about", "right"),
    [
        ("s3", {"ETag": f'"{MD5.hexdigest()}"'}, True),
        ("s3", {"ETag": '"0123456789abcdef0123456789abcdef"'}, False),
        ("gs", {"md5Hash": base64.b64encode(MD5.digest()).decode(), "crc32c": "3n67zA=="}, True),
        ("gs", {"md5Hash": base64.b64encode(bytes(16)).decode(), "crc32c": "3n67zA=="}, False),
        ("gs", {"crc32c": "3n67zA==", "componentCount": "2"}, False),  # a composite object, which has no MD5
    ],
)
def test_a_checksum_of_a_store_proves_the_bytes_or_nothing(
    scheme: str, about: dict[str, str], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proved(scheme, about, monkeypatch) == right


@pytest.mark.parametrize("error", [ValueError("I/O operation on closed file"), OSError("curlCode 7")])
def test_a_store_that_fails_during_a_request_is_reported(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="bucket/file"):
        proved("gs", error, monkeypatch)
