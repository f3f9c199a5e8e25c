"""What tells two checkpoints apart without reading all of them.

sha256 over config, code, headers, sizes, and samples of the weights: some of each file, and some of each tensor, so that a
fine-tuned or repaired checkpoint is told from its twin even if a single matrix differs. It is no proof that no byte differs.
The same checkpoint has the same fingerprint on a disk and in an object store.
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

_Range = tuple[str, int, int]  # file, first byte, bytes
_SAMPLES, _SAMPLE_BYTES, _LEAST_SAMPLE = 16, 65536, 64  # of a file
_TENSOR_BYTES, _LEAST_TENSOR = 256, 16  # of a tensor
_SHARE = 100  # at most this part of a small file or tensor is read, so that little is read twice
_REQUESTS = 64  # at a time, of an object store: a sample costs a journey there and back


class Headers(Protocol):
    """What a fingerprint is calculated from: a `Checkpoint`, whose module uses this one."""

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
    """The fingerprint of a checkpoint, of which the headers were read already."""
    store, digest = checkpoint.store, hashlib.sha256(checkpoint.headers_sha256.encode())
    files = sorted({info.file for info in (*checkpoint.tensors.values(), *checkpoint.buffers)})
    sizes = [[file, store.size(file)] for file in files]
    digest.update(json.dumps([sizes, checkpoint.config], sort_keys=True).encode())
    blocks = {info.fp8.block for info in checkpoint.tensors.values() if info.fp8}
    digest.update(repr(sorted(blocks)).encode() if blocks else b"")
    for name in checkpoint.extras:
        if name.endswith(".py"):  # code that the model brings makes it another model
            digest.update(store.read(name))
    with ThreadPoolExecutor(1 if store.is_local else _REQUESTS) as pool:
        for piece in pool.map(lambda where: store.read(*where), _ranges(checkpoint, files)):
            digest.update(piece)
    return digest.hexdigest()


def _ranges(checkpoint: Headers, files: list[str]) -> Iterator[_Range]:
    for file in files:
        yield from _of_file(file, checkpoint.store.size(file))
    for info in chain.from_iterable(info.stored for info in checkpoint.tensors.values()):
        length = min(info.nbytes, max(_LEAST_TENSOR, min(_TENSOR_BYTES, info.nbytes // _SHARE)))
        yield info.file, info.start + (info.nbytes - length) // 2, length


def _of_file(file: str, size: int) -> Iterator[_Range]:
    """Ranges at even distances, the end of the file among them."""
    length = min(size, max(_LEAST_SAMPLE, min(_SAMPLE_BYTES, size // (_SHARE * _SAMPLES))))
    for number in range(_SAMPLES):
        yield file, max(0, (size - length) * number // (_SAMPLES - 1)), length
