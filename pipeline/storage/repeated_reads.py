"""Bytes that came without a checksum, read a second time and compared.

A range of an object that travels over plain http has none: TCP's 16 bits let one bad packet in some ten thousands through, and a
proxy computes them anew over what it spoiled. The second reading asks for other ranges than the first, so that whatever spoils
the same place of every answer spoils other bytes of the object. An object too short to be cut elsewhere is the limit: two readings
of it that are spoiled in the same bit are taken for right.
"""

import time
from collections.abc import Callable
from itertools import pairwise

COMPARED_BYTES = 8 << 20  # bytes that are compared at a time: a second copy of a tensor of any size is never held
_PAUSE_SECONDS = (
    0.0,
    0.2,
    0.2,
    1.0,
    2.0,
    4.0,
    0.0,
)  # seconds before each reading after the first: what spoils bytes may be over soon
_SHIFT = 409  # bytes by which each reading begins and ends elsewhere than the one before

Read = Callable[[int, int], bytes | bytearray]  # (first byte, behind the last byte) of an object -> its bytes


class ReadsDiffer(Exception):
    """Readings of a range do not agree; holds its first byte."""


def confirm_by_rereading(
    data: bytearray, start: int, size: int, read: Read, pause: Callable[[float], None] = time.sleep
) -> None:
    """Make `data`, read from `start` of an object of `size` bytes, what readings agree on.

    Two are enough, unless they differ: then spoiled bytes are so frequent that two may agree by chance, and three in a row have to.

    Raises:
        Unequal: they never do.
    """
    for first in range(0, len(data), COMPARED_BYTES):
        own = slice(first, min(first + COMPARED_BYTES, len(data)))
        before, alike, wanted = bytes(data[own]), 1, 2
        for number, seconds in enumerate(_PAUSE_SECONDS, 1):
            pause(seconds)
            again = _shifted(read, start + own.start, start + own.stop, size, number * _SHIFT)
            alike, wanted = (alike + 1, wanted) if again == before else (1, 3)
            before = again
            if alike == wanted:
                break
        else:
            raise ReadsDiffer(start + own.start)
        if wanted > 2:
            data[own] = before


def _shifted(read: Read, start: int, stop: int, size: int, by: int) -> bytes:
    """Bytes [start, stop), by ranges that begin and end elsewhere: before and behind them, or at the object's ends within."""
    first, last = start - by if start >= by else start, stop + by if stop + by <= size else stop
    cuts = {first, last, start + by if first == start else first, stop - by if last == stop else last}
    inner = sorted(cut for cut in cuts if first <= cut <= last)
    found = b"".join(bytes(read(*own)) for own in pairwise(inner))
    return found[start - first : stop - first]
