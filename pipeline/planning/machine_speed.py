"""How fast this machine is, measured for a moment: one core at the GEMM, at adding up rows, and at reading and hashing."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.checkpoints.checkpoint import Checkpoint
from swsc_core.method.pairwise import sum_by_label

_READ_BYTES = 64 << 20  # of the largest tensor, at most
_REPEATS = 15
_SIDE = 1024  # of the square matrices of the GEMM; rows that are added up are four times as long and as many


@dataclass(frozen=True)
class Speed:
    """Of one core.

    Attributes:
        gemm: float32 operations a second.
        additions: float32 additions a second of rows that share a label, which is what Lloyd's iterations are made of.
        stream: bytes a second that are read from the source and hashed twice, as all that is written is.
    """

    gemm: float
    additions: float
    stream: float


def measure_speed(source: Checkpoint) -> Speed:
    """Takes about a second beside reading _READ_BYTES of the source."""
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
    """The middle one of a few: the machine as it is, not as it is at its best."""
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _stream(source: Checkpoint) -> float:
    largest = max(source.tensors.values(), key=lambda info: info.nbytes)
    nbytes = min(largest.nbytes, _READ_BYTES, source.store.size(largest.file) - largest.start)
    started = time.perf_counter()
    whole, own = hashlib.sha256(), hashlib.sha256()
    for piece in source.store.stream(largest.file, largest.start, nbytes):
        whole.update(piece)
        own.update(piece)
    return max(1, nbytes) / (time.perf_counter() - started)
