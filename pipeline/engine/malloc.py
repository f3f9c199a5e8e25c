"""How much memory a process took, and how it gives freed memory back.

glibc serves blocks of up to 32 MiB from a heap of which it gives back the end only. A slab's temporaries are such blocks,
and after some rounds the holes between them took as much as two copies of a large matrix (benchmarks/memory.py).
"""

import contextlib
import ctypes
import resource
import sys

_LARGE = (
    1 << 22
)  # weights of a matrix for which it pays: new pages for every temporary cost small matrices 15% of their time
_MAPPED = 1 << 20  # bytes from which a block has pages of its own and gives them back at once
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def return_freed_blocks(weights: int) -> None:
    """From now on, if a matrix of so many `weights` is a large one; without effect where the C library is not glibc."""
    if weights < _LARGE or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _MAPPED)


def reset_peak_rss() -> None:
    """Let `peak_rss` begin anew, where the kernel permits it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): reset the peak resident set size


def peak_rss() -> int:
    """Largest resident memory of this process so far, or since it was reset, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
