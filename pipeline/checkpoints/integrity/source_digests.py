"""Digests of a verified source, which are small enough to be sent with every task that loads the model."""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.digests import with_digests
from pipeline.checkpoints.sources.small_files import forget_small_files, small_files_sha256
from pipeline.errors import StoreError

# Bytes of a sha256.
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class SourceDigests:
    """Digests of a source that the driver has verified.

    Attributes:
        described: sha256 of the headers and the config.
        small_files: sha256 of all files that are not weights: config.json, tokenizer, code, …
        tensors: sha256 of each stored tensor, 32 bytes each, in the order of files and offsets.
    """

    described: str
    small_files: str
    tensors: bytes

    @property
    def name(self) -> str:
        """16 hexadecimal digits that identify everything except the small files."""
        return hashlib.sha256(self.described.encode() + self.tensors).hexdigest()[:16]


def digests_of_source(source: Checkpoint) -> SourceDigests | None:
    """Return the digests of a verified source, which later readings compare; None if it was not verified."""
    if not source.verified:
        return None
    tensors = b"".join(bytes.fromhex(info.sha256[0]) for info in _stored(source))
    return SourceDigests(_described(source), small_files_sha256(source.store.root), tensors)


def with_source_digests(source: Checkpoint, expected: SourceDigests) -> Checkpoint:
    """Attach the digests of the driver to a source that was opened here. Every tensor is compared when it is read.

    Raises:
        StoreError: headers, config or other small files differ from those that the driver has read.
    """
    stored = _stored(source)
    same_files = small_files_sha256(source.store.root) == expected.small_files
    if (
        not same_files
        or _described(source) != expected.described
        or len(expected.tensors) != _DIGEST_BYTES * len(stored)
    ):
        forget_small_files()  # this process may hold a damaged copy
        raise StoreError(
            f"{source.store.root}: config.json, headers or other small files differ from those read before: they were"
            " changed, or the connection to the store damages data; run the same command again"
        )
    digests = (
        expected.tensors[start : start + _DIGEST_BYTES].hex()
        for start in range(0, len(expected.tensors), _DIGEST_BYTES)
    )
    return with_verified_digests(source, {info.name: (digest,) for info, digest in zip(stored, digests, strict=True)})


def with_verified_digests(source: Checkpoint, digests: dict[str, tuple[str, ...]]) -> Checkpoint:
    """Attach digests, by tensor names in the files, to the tensors and buffers of a source, and mark it as verified."""
    buffers = with_digests({info.name: info for info in source.buffers}, digests)
    tensors = with_digests(source.tensors, digests)
    return replace(source, tensors=tensors, buffers=tuple(buffers.values()), verified=True)


def _stored(source: Checkpoint) -> list[TensorInfo]:
    """Return the stored tensors that are read, each once, in the order of files and offsets."""
    infos = chain.from_iterable(info.stored for info in (*source.tensors.values(), *source.buffers))
    by_position = {(info.file, info.start, info.name): info for info in infos}
    return [by_position[position] for position in sorted(by_position)]


def _described(source: Checkpoint) -> str:
    config = json.dumps(source.config, sort_keys=True)
    return hashlib.sha256(f"{source.headers_sha256} {config}".encode()).hexdigest()
