"""Integers of 0 to 16 bits packed without gaps into bytes, least significant bit first.

Value i occupies bits i*bits .. (i+1)*bits - 1 of the stream, and bit j of the stream is bit j % 8 of byte j // 8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Values that are packed, and unpacked, at a time, so that temporaries are bounded. A multiple of eight values fills
# whole bytes, so that blocks are independent. Unpacking takes fewer temporaries per value.
_BLOCK = 1 << 17
_UNPACKED_BLOCK = 1 << 20


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits occupy."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers [n] in [0, 2**bits) into uint8 [packed_bytes(n, bits)].

    Raises:
        ValueError: values out of range.
    """
    if bits == 0:
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"values span {low} to {high}, expected 0 to {(1 << bits) - 1} for {bits} bits; use more bits")
    return torch.cat([_pack_block(block, bits) for block in torch.split(values, _BLOCK)])


def _pack_block(values: Tensor, bits: int) -> Tensor:
    positions = torch.arange(bits, device=values.device, dtype=torch.int32)
    stream = ((values.to(torch.int32)[:, None] >> positions) & 1).to(torch.uint8).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, device=values.device, dtype=torch.uint8)
    return (stream * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int32 [count] from uint8 [packed_bytes(count, bits)].

    Raises:
        ValueError: another number of bytes.
    """
    if packed.numel() != packed_bytes(count, bits):
        expected = packed_bytes(count, bits)
        raise ValueError(f"{packed.numel()} bytes for {count} values of {bits} bits, expected {expected}")
    if bits == 0:
        return torch.zeros(count, dtype=torch.int32, device=packed.device)
    parts = []
    for start in range(0, count, _UNPACKED_BLOCK):
        size = min(_UNPACKED_BLOCK, count - start)
        first = start * bits // 8
        parts.append(_unpack_block(packed[first : first + packed_bytes(size, bits)], bits, size))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def packed_slice(packed: Tensor, bits: int, first: int, last: int, count: int) -> Tensor:
    """Values `first` to `last` of `count` packed values, as a packed tensor of their own.

    It is a view if the slice begins and ends at a byte, else the values are packed again.
    """
    if first * bits % 8 == 0 and (last * bits % 8 == 0 or last == count):
        return packed[first * bits // 8 : packed_bytes(last, bits)]
    # Eight values fill whole bytes.
    start = first // 8 * 8
    values = unpack(packed[start * bits // 8 : packed_bytes(last, bits)], bits, last - start)
    return pack(values[first - start :], bits)


def _unpack_block(packed: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return packed.to(torch.int32)
    rows = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, rows * bits - packed.numel()))
    return unpack_eights(padded.reshape(rows, bits)).reshape(-1)[:count]


def unpack_eights(packed: Tensor) -> Tensor:
    """Groups of eight values, int32 [..., 8], from `bits` bytes each, uint8 [..., bits].

    In each group the values have the same bit positions, and each is composed of one to three bytes. No step depends on
    the number of values, so that compiled code works for any number.
    """
    bits = packed.shape[-1]
    columns = packed.to(torch.int32).unbind(dim=-1)
    return torch.stack([_column(columns, index * bits, bits) for index in range(8)], dim=-1)


def _column(columns: Sequence[Tensor], start: int, bits: int) -> Tensor:
    """The integers in bits start .. start + bits - 1 of each row of bytes, given by columns."""
    first, last = start // 8, (start + bits - 1) // 8
    value = columns[first] >> start % 8
    for byte in range(first + 1, last + 1):
        value = value | columns[byte] << 8 * byte - start
    return value & (1 << bits) - 1
