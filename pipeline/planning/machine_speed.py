"""A short benchmark of one core: matrix products, sums of rows, and reading with hashing."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.checkpoints.checkpoint import Checkpoint
from swsc_core.method.pairwise import sum_by_label

# Bytes of the largest tensor that are read at most.
_READ_BYTES = 64 << 20
_REPEATS = 15
# Side of the square matrices that are multiplied. The matrix whose rows are summed is four times as large in both
# dimensions.
_SIDE = 1024


@dataclass(frozen=True)
class Speed:
    """Speed of one core.

    Attributes:
        gemm: float32 operations per second of matrix products.
        additions: float32 additions per second when rows with the same label are summed, as in Lloyd's iterations.
        stream: bytes per second that are read from the source and hashed twice, as everything that is written is.
    """

    gemm: float
    additions: float
    stream: float


def measure_speed(source: Checkpoint) -> Speed:
    """Measure the speed, in about a second and the time to read _READ_BYTES of the source."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square, rows = torch.ones(_SIDE, _SIDE), torch.ones(4 * _SIDE, 4 * _SIDE)
    labels = torch.randint(256, (len(rows),), generator=torch.Generator().manual_seed(0))
    gemm = 2 * _SIDE**3 / _seconds(lambda: square @ square)
    additions = rows.numel() / _seconds(lambda: sum_by_label(rows, labels, 256))
    torch.set_num_threads(threads)
    return Speed(gemm, additions, _stream(source))


def _seconds(call: Callable[[], object]) -> float:
    """The median of several runs, which describes the machine under its present load better than the minimum."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _stream(source: Checkpoint) -> float:
    largest = max(source.tensors.values(), key=lambda info: info.nbytes)
    nbytes = min(largest.nbytes, _READ_BYTES, source.store.size(largest.file) - largest.start)
    started = time.perf_counter()
    hashes = hashlib.sha256(), hashlib.sha256()
    for block in source.store.stream(largest.file, largest.start, nbytes):
        for digest in hashes:
            digest.update(block)
    return max(1, nbytes) / (time.perf_counter() - started)
