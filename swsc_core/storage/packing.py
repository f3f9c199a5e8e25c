"""Integers of 0 to 16 bits packed without gaps into bytes, least significant bit first.

Value i occupies bits i*bits .. (i+1)*bits - 1 of the stream, and bit j of the stream is bit j % 8 of byte j // 8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A multiple of eight values fills whole bytes, so blocks can be packed on their own: memory stays bounded.
_BLOCK = 1 << 17
_UNPACKED = 1 << 20  # as above, where a value takes fewer temporaries


def packed_bytes(count: int, bits: int) -> int:
    """Number of bytes that `count` values of `bits` bits occupy."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack a 1-D integer tensor of values in [0, 2**bits) into a uint8 tensor of packed_bytes(n, bits) bytes."""
    if bits == 0:
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"values span {low} to {high}, which {bits} bits cannot hold")
    return torch.cat([_pack_block(block, bits) for block in values.split(_BLOCK)])


def _pack_block(values: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, device=values.device, dtype=torch.int32)
    stream = ((values.to(torch.int32)[:, None] >> places) & 1).to(torch.uint8).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, device=values.device, dtype=torch.uint8)
    return (stream * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int32 tensor [count] from uint8 tensor [packed_bytes(count, bits)]."""
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{packed.numel()} bytes for {count} values of {bits} bits, wanted {packed_bytes(count, bits)}"
        )
    if bits == 0:
        return torch.zeros(count, dtype=torch.int32, device=packed.device)
    parts = []
    for start in range(0, count, _UNPACKED):
        size = min(_UNPACKED, count - start)
        first = start * bits // 8
        parts.append(_unpack_block(packed[first : first + packed_bytes(size, bits)], bits, size))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def packed_slice(packed: Tensor, bits: int, first: int, last: int, count: int) -> Tensor:
    """Values `first` to `last` of `count` packed ones, packed on their own: a view where they begin and end at a byte."""
    if first * bits % 8 == 0 and (last * bits % 8 == 0 or last == count):
        return packed[first * bits // 8 : packed_bytes(last, bits)]
    start = first // 8 * 8  # eight values fill whole bytes
    values = unpack(packed[start * bits // 8 : packed_bytes(last, bits)], bits, last - start)
    return pack(values[first - start :], bits)


def _unpack_block(packed: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return packed.to(torch.int32)
    rows = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, rows * bits - packed.numel()))
    return unpack_eights(padded.reshape(rows, bits)).reshape(-1)[:count]


def unpack_eights(packed: Tensor) -> Tensor:
    """int32 [..., 8] of uint8 [..., bits]: eight values lie in `bits` bytes, always at the same places, and are put together
    from one to three bytes each. No step depends on the number of values, so that a compiler need not know it."""
    bits = packed.shape[-1]
    columns = packed.to(torch.int32).unbind(dim=-1)
    return torch.stack([_column(columns, place * bits, bits) for place in range(8)], dim=-1)


def _column(columns: Sequence[Tensor], start: int, bits: int) -> Tensor:
    """The integer of bits start .. start + bits - 1 of each row of bytes."""
    first, last = start // 8, (start + bits - 1) // 8
    value = columns[first] >> start % 8
    for byte in range(first + 1, last + 1):
        value = value | columns[byte] << 8 * byte - start
    return value & (1 << bits) - 1
