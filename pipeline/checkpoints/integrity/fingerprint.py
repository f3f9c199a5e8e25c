"""The fingerprint of a checkpoint, which distinguishes it from other ones without reading all of it.

The fingerprint is the sha256 of config, code, headers, sizes, and samples of the weights: some of each file and some of
each tensor, so that a fine-tuned or repaired checkpoint has another fingerprint even if a single matrix differs. Equal
fingerprints do not prove equal bytes. The same checkpoint has the same fingerprint on a disk and in an object store.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Protocol

from pipeline.architectures.model_config import ModelConfig
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.storage.store import Store

# File, first byte, number of bytes.
_Range = tuple[str, int, int]
# Samples of a file, and the largest and smallest size of each.
_FILE_SAMPLES, _FILE_SAMPLE_BYTES, _MIN_FILE_SAMPLE_BYTES = 16, 65536, 64
# The largest and smallest size of the sample of a tensor.
_TENSOR_SAMPLE_BYTES, _MIN_TENSOR_SAMPLE_BYTES = 256, 16
# At most one byte in so many is read of a small file or tensor.
_BYTES_PER_SAMPLED_BYTE = 100
# Concurrent requests to an object store, where the latency of a sample dominates.
_REQUESTS = 64


class Headers(Protocol):
    """What a fingerprint is computed from: a `Checkpoint`, whose module imports this one."""

    @property
    def store(self) -> Store: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def buffers(self) -> tuple[TensorInfo, ...]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def extras(self) -> tuple[str, ...]: ...
    @property
    def headers_sha256(self) -> str: ...


def fingerprint_of(checkpoint: Headers) -> str:
    """Compute the fingerprint of a checkpoint; reads samples of its files."""
    store, digest = checkpoint.store, hashlib.sha256(checkpoint.headers_sha256.encode())
    files = sorted({info.file for info in (*checkpoint.tensors.values(), *checkpoint.buffers)})
    sizes = [[file, store.size(file)] for file in files]
    digest.update(json.dumps([sizes, checkpoint.config], sort_keys=True).encode())
    blocks = {info.fp8.block for info in checkpoint.tensors.values() if info.fp8}
    digest.update(repr(sorted(blocks)).encode() if blocks else b"")
    for name in checkpoint.extras:
        if name.endswith(".py"):  # other code makes another model
            digest.update(store.read(name))
    with ThreadPoolExecutor(1 if store.is_local else _REQUESTS) as pool:
        for sample in pool.map(lambda sampled: store.read(*sampled), _sampled_ranges(checkpoint, files)):
            digest.update(sample)
    return digest.hexdigest()


def _sampled_ranges(checkpoint: Headers, files: list[str]) -> Iterator[_Range]:
    for file in files:
        yield from _file_samples(file, checkpoint.store.size(file))
    for info in chain.from_iterable(info.stored for info in checkpoint.tensors.values()):
        largest = min(_TENSOR_SAMPLE_BYTES, info.nbytes // _BYTES_PER_SAMPLED_BYTE)
        length = min(info.nbytes, max(_MIN_TENSOR_SAMPLE_BYTES, largest))
        yield info.file, info.start + (info.nbytes - length) // 2, length


def _file_samples(file: str, size: int) -> Iterator[_Range]:
    """Yield evenly spaced ranges, from the beginning to the end of the file."""
    largest = min(_FILE_SAMPLE_BYTES, size // (_BYTES_PER_SAMPLED_BYTE * _FILE_SAMPLES))
    length = min(size, max(_MIN_FILE_SAMPLE_BYTES, largest))
    for number in range(_FILE_SAMPLES):
        yield file, max(0, (size - length) * number // (_FILE_SAMPLES - 1)), length
