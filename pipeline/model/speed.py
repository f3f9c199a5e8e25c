"""How fast this machine is, measured for a moment: one core at a GEMM, and at reading and hashing what it reads."""

import hashlib
import time
from dataclasses import dataclass

from pipeline.model.checkpoint import Checkpoint

_READ_BYTES = 64 << 20  # of the largest tensor, at most
_REPEATS = 4


@dataclass(frozen=True)
class Speed:
    """Of one core.

    Attributes:
        gemm: float32 operations a second.
        stream: bytes a second that are read from the source and hashed twice, as all that is written is.
    """

    gemm: float
    stream: float


def measure_speed(source: Checkpoint) -> Speed:
    """Takes a fraction of a second beside reading _READ_BYTES of the source."""
    return Speed(_gemm(), _stream(source))


def _gemm() -> float:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square = torch.ones(1024, 1024)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        square @ square
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return float(2 * 1024**3 / min(seconds))


def _stream(source: Checkpoint) -> float:
    largest = max(source.tensors.values(), key=lambda info: info.nbytes)
    nbytes = min(largest.nbytes, _READ_BYTES)
    started = time.perf_counter()
    whole, own = hashlib.sha256(), hashlib.sha256()
    for piece in source.store.stream(largest.file, largest.start, nbytes):
        whole.update(piece)
        own.update(piece)
    return max(1, nbytes) / (time.perf_counter() - started)
