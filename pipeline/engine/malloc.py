"""Memory of this process: its peak, and how freed memory returns to the system.

glibc serves blocks of up to 32 MiB from a heap of which it returns only the end. The temporaries of a slab are such
blocks. After some rounds the holes between them took as much memory as two copies of a large matrix
(benchmarks/memory.py).
"""

import contextlib
import ctypes
import resource
import sys

# Weights of a matrix from which returning blocks pays. New pages for every temporary cost small matrices 15% of their
# time.
_LARGE = 1 << 22
# Bytes from which a block has pages of its own, which are returned as soon as it is freed.
_MAPPED = 1 << 20
# Names of mallopt's parameters in malloc.h.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def return_freed_blocks(weights: int) -> None:
    """Make glibc return freed blocks to the system for the rest of this process.

    No-op for a matrix of fewer than `_LARGE` weights, and where the C library is not glibc.
    """
    if weights < _LARGE or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _MAPPED)


def reset_peak_rss() -> None:
    """Restart the measurement of `peak_rss`, where the kernel permits it."""
    # proc(5): writing 5 resets the peak resident set size.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_rss() -> int:
    """Return the largest resident memory of this process, in bytes, since it started or since the last reset."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
