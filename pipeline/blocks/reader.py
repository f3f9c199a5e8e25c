"""Reads the tensors of a block when they are needed, or ahead of time in a thread of its own."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from torch import Tensor

from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.models.stored_model import Model


class TensorReader:
    """Reads dense tensors of a model by name, each once; compressed ones are restored.

    Attributes:
        bytes_read: bytes that were read from files so far.
    """

    def __init__(self, source: Model, digests: RangeDigests | None = None) -> None:
        """`digests` receives the digests of the ranges of tensors that are stored dense, if given."""
        self._source, self._digests = source, digests
        self._buffers = {info.name: info for info in source.checkpoint.buffers}
        self._ahead: dict[str, Future[Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._lock = Lock()
        self.bytes_read = 0

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begin to read tensors. Those that were read ahead before and are not among `names` are dropped."""
        requested = dict.fromkeys(names)
        for name in self._ahead.keys() - requested.keys():
            self._ahead.pop(name).cancel()
        for name in requested:
            if name not in self._ahead:
                self._ahead[name] = self._thread.submit(self._read, name)

    def lazy(self, names: Iterable[str]) -> dict[str, "LazyTensor"]:
        """Name -> an object that reads the tensor on indexing."""
        return {name: LazyTensor(self, name) for name in names}

    def take(self, name: str) -> Tensor:
        """A tensor, read now unless it was read ahead."""
        ahead = self._ahead.pop(name, None)
        return self._read(name) if ahead is None else ahead.result()

    def _read(self, name: str) -> Tensor:
        with self._lock:
            self.bytes_read += self.stored_bytes(name)
        checkpoint = self._source.checkpoint
        if name in self._buffers:
            return read_tensor(checkpoint.store, self._buffers[name])
        if self._source.is_compressed(name):
            return self._source.read(name)
        return read_tensor(checkpoint.store, checkpoint.tensors[name], self._digests)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in its files."""
        return sum(self._tensor_bytes(stored) for stored in self._stored(name))

    def _stored(self, name: str) -> Iterator[str]:
        """Names of the stored tensors that a dense tensor is read from."""
        if not self._source.is_compressed(name):
            yield name
            return
        if name in self._source.pieces:
            yield name
        for matrix in self._source.pieces.get(name, [name]):
            yield from self._source.parts(matrix).values()

    def _tensor_bytes(self, name: str) -> int:
        info = self._buffers.get(name) or self._source.checkpoint.tensors[name]
        return sum(part.nbytes for part in info.stored) if info.fp8 else info.nbytes


class LazyTensor:
    """Looks like a slice of safetensors to transformers, which indexes it when it needs the values."""

    def __init__(self, reader: TensorReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._reader.take(self._name)[index]
