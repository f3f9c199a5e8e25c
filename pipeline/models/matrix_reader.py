"""Reads the matrices of a source on a worker: timed, with digests of what was read, and each fused tensor once."""

import time
from dataclasses import dataclass

import torch

from pipeline.checkpoints.integrity.digests import RangeDigests, ranges_of
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.tensor_io import read_matrix
from pipeline.storage.store import Store


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix as it was read.

    Attributes:
        path: file that holds it, for messages.
        weight: [m, n], on the worker's device.
        seconds: that reading took.
        sha256: digests of the byte ranges that were read for it.
    """

    info: MatrixInfo
    path: str
    weight: torch.Tensor
    seconds: float
    sha256: RangeDigests


class MatrixReader:
    """Reads matrices of one source onto one device.

    A fused tensor stays in CPU memory for the matrices that follow. Of stacked experts only one stays, because a layer's experts are
    too large to be held together.
    """

    def __init__(self, source: Store, device: str) -> None:
        self.digests: RangeDigests = {}  # of every byte range that was read
        self._source, self._device = source, device
        self._wholes: dict[MatrixInfo, torch.Tensor] = {}

    def read(self, info: MatrixInfo) -> SourceMatrix:
        """Read one matrix. Raises StoreError if its bytes differ from those of its known sha256."""
        started = time.perf_counter()
        if info.rows is None:
            weight = read_matrix(self._source, info, self.digests).to(self._device)
        else:
            weight = info.rows.take(self.whole(info.fused)).to(self._device)
        seconds = time.perf_counter() - started
        digests = {where: self.digests[where] for where in ranges_of(info)}
        return SourceMatrix(info, f"{self._source.root}/{info.file}", weight, seconds, digests)

    def whole(self, fused: MatrixInfo) -> torch.Tensor:
        """A fused matrix, on the CPU."""
        if fused not in self._wholes:
            self._wholes = {key: whole for key, whole in self._wholes.items() if key.expert is None}
            self._wholes[fused] = read_matrix(self._source, fused, self.digests)
        return self._wholes[fused]


def read_source_matrix(source: Store, info: MatrixInfo, device: str) -> SourceMatrix:
    """Read a matrix whose neighbours in its layer are not needed."""
    return MatrixReader(source, device).read(info)
