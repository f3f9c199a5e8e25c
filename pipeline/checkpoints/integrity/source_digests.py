"""Digests of a whole source that was verified: small enough to go with every task that loads the model."""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.digests import with_digests
from pipeline.checkpoints.sources.small_files import forget_small_files, small_files_sha256
from pipeline.errors import StoreError

_BYTES = 32  # of a sha256


@dataclass(frozen=True)
class SourceDigests:
    """What a source is, as the driver has verified it.

    Attributes:
        described: sha256 over the headers and the config.
        small_files: sha256 over config.json, tokenizer, code and what else is not weights.
        tensors: sha256 of each stored tensor, 32 bytes each, in the order of their files and offsets.
    """

    described: str
    small_files: str
    tensors: bytes

    @property
    def name(self) -> str:
        """16 hexadecimal digits that stand for all of it but the small files."""
        return hashlib.sha256(self.described.encode() + self.tensors).hexdigest()[:16]


def digests_of_source(source: Checkpoint) -> SourceDigests | None:
    """What every later reading of a verified source is held against; None if it was not verified."""
    if not source.verified:
        return None
    tensors = b"".join(bytes.fromhex(info.sha256[0]) for info in _stored(source))
    return SourceDigests(_described(source), small_files_sha256(source.store.root), tensors)


def with_source_digests(source: Checkpoint, known: SourceDigests) -> Checkpoint:
    """A source as it was opened here, of which every tensor is held against `known` when it is read.

    Raises:
        StoreError: headers, config or other small files are not those that the driver has read.
    """
    stored = _stored(source)
    same_files = small_files_sha256(source.store.root) == known.small_files
    if not same_files or _described(source) != known.described or len(known.tensors) != _BYTES * len(stored):
        forget_small_files()  # this process may have copied them as other bytes: it reads them again
        raise StoreError(
            f"{source.store.root}: config.json, headers or other small files are read as other bytes than before: they were"
            " changed, or what lies between corrupts what it carries"
        )
    digests = (known.tensors[start : start + _BYTES].hex() for start in range(0, len(known.tensors), _BYTES))
    return with_verified_digests(source, {info.name: (digest,) for info, digest in zip(stored, digests, strict=True)})


def with_verified_digests(source: Checkpoint, found: dict[str, tuple[str, ...]]) -> Checkpoint:
    """A source whose tensors, masks and the like included, have the digests `found`, by their names in the files."""
    buffers = with_digests({info.name: info for info in source.buffers}, found)
    return replace(source, tensors=with_digests(source.tensors, found), buffers=tuple(buffers.values()), verified=True)


def _stored(source: Checkpoint) -> list[TensorInfo]:
    """What lies in the files and is read, each once."""
    own = chain.from_iterable(info.stored for info in (*source.tensors.values(), *source.buffers))
    return sorted({(info.file, info.start, info.name): info for info in own}.values(), key=_place)


def _place(info: TensorInfo) -> tuple[str, int, str]:
    return info.file, info.start, info.name


def _described(source: Checkpoint) -> str:
    config = json.dumps(source.config, sort_keys=True)
    return hashlib.sha256(f"{source.headers_sha256} {config}".encode()).hexdigest()
