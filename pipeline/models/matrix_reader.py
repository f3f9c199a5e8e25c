"""Reads matrices of a source on a worker, with times and digests, and each fused tensor only once."""

import time
from dataclasses import dataclass

import torch

from pipeline.checkpoints.integrity.digests import RangeDigests, ranges_of
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.tensor_io import read_matrix
from pipeline.storage.store import Store


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix that was read.

    Attributes:
        info: its description.
        path: the file that holds it, for messages.
        weight: [m, n], on the worker's device.
        seconds: time that reading took.
        sha256: digests of the byte ranges that were read for it.
    """

    info: MatrixInfo
    path: str
    weight: torch.Tensor
    seconds: float
    sha256: RangeDigests


class MatrixReader:
    """Reads matrices of one source onto one device.

    A fused tensor stays in CPU memory for its next matrices. Only one expert of a stack stays, because the experts of a
    layer do not fit into memory together.

    Attributes:
        digests: digests of all byte ranges that were read.
    """

    def __init__(self, source: Store, device: str) -> None:
        self.digests: RangeDigests = {}
        self._source, self._device = source, device
        self._fused: dict[MatrixInfo, torch.Tensor] = {}

    def read(self, info: MatrixInfo) -> SourceMatrix:
        """Read one matrix. Raises StoreError if the bytes do not match its known sha256."""
        started = time.perf_counter()
        if info.rows is None:
            weight = read_matrix(self._source, info, self.digests).to(self._device)
        else:
            weight = info.rows.take(self.read_fused(info.fused)).to(self._device)
        seconds = time.perf_counter() - started
        digests = {where: self.digests[where] for where in ranges_of(info)}
        return SourceMatrix(info, f"{self._source.root}/{info.file}", weight, seconds, digests)

    def read_fused(self, info: MatrixInfo) -> torch.Tensor:
        """Return a fused matrix on the CPU."""
        if info not in self._fused:
            self._fused = {key: tensor for key, tensor in self._fused.items() if key.expert is None}
            self._fused[info] = read_matrix(self._source, info, self.digests)
        return self._fused[info]


def read_source_matrix(source: Store, info: MatrixInfo, device: str) -> SourceMatrix:
    """Read a single matrix of a source."""
    return MatrixReader(source, device).read(info)
