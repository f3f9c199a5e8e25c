"""Confirms bytes that arrived without a checksum by reading them again.

A range of an object that travels over plain http has no checksum: the 16 bits of TCP let about one damaged packet in
ten thousand pass, and a proxy recomputes them over bytes that it has damaged itself. Each reading asks for other ranges
than the one before, so that a fault at a fixed position of every answer damages other bytes of the object. An object
that is too short to be cut at other positions is the limit: two readings with the same damaged bit are accepted.
"""

import time
from collections.abc import Callable
from itertools import pairwise

# Bytes that are compared at a time, so that a large tensor is never held twice.
COMPARED_BYTES = 8 << 20
# Seconds before each reading after the first: a cause of damage may be temporary.
_PAUSE_SECONDS = (0.0, 0.2, 0.2, 1.0, 2.0, 4.0, 0.0)
# Bytes by which the ranges of each reading are shifted against the reading before.
_SHIFT = 409

# Returns the bytes [first, last) of an object.
Read = Callable[[int, int], bytes | bytearray]


class ReadsDiffer(Exception):
    """Readings of a range never agree. The argument is the first byte of the range."""


def confirm_by_rereading(
    data: bytearray, start: int, size: int, read: Read, pause: Callable[[float], None] = time.sleep
) -> None:
    """Replace `data` by bytes that repeated readings agree on.

    Two equal readings suffice. If the first two differ, damage is so frequent that two readings may agree by chance,
    and three equal readings in a row are required.

    Args:
        data: the first reading.
        start: its offset in the object.
        size: bytes of the object.

    Raises:
        ReadsDiffer: the readings never agree.
    """
    for first in range(0, len(data), COMPARED_BYTES):
        piece = slice(first, min(first + COMPARED_BYTES, len(data)))
        data[piece] = _confirmed(bytes(data[piece]), start + piece.start, size, read, pause)


def _confirmed(piece: bytes, start: int, size: int, read: Read, pause: Callable[[float], None]) -> bytes:
    """Return the bytes from offset `start` on that enough readings in a row agree on; `piece` is the first reading."""
    equal_readings, required = 1, 2
    for number, seconds in enumerate(_PAUSE_SECONDS, 1):
        pause(seconds)
        reading = _read_shifted(read, start, start + len(piece), size, number * _SHIFT)
        if reading == piece:
            equal_readings += 1
        else:
            equal_readings, required = 1, 3
        piece = reading
        if equal_readings == required:
            return piece
    raise ReadsDiffer(start)


def _read_shifted(read: Read, start: int, stop: int, size: int, shift: int) -> bytes:
    """Read bytes [start, stop) by ranges whose ends are shifted: outwards, or inwards at the object's ends."""
    first = start - shift if start >= shift else start
    last = stop + shift if stop + shift <= size else stop
    cuts = {first, last, start + shift if first == start else first, stop - shift if last == stop else last}
    inner_cuts = sorted(cut for cut in cuts if first <= cut <= last)
    data = b"".join(bytes(read(*bounds)) for bounds in pairwise(inner_cuts))
    return data[start - first : stop - first]
