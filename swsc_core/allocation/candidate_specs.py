"""The specs that a budget chooses among, from half a bit to eight bits a weight.

Which segment size is best at a rate depends on the shape (a codebook costs a large matrix little), on the metric and on
the weights: candidates are tried, none is assumed to win.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from swsc_core.method.spec import SwscSpec

# segment size -> label bits. Longer segments fill space better and need larger codebooks for it.
_LABEL_BITS = {8: (4, 6, 8, 10), 6: (8, 9), 4: (6, 7, 8, 9, 10), 3: (8, 9, 10), 2: (4, 5, 6, 7, 8, 10), 1: (4, 5, 6, 8)}
_INPUT_AXIS = {(4, 8), (2, 6)}  # size and label bits that are tried down the columns, too
_CODEBOOK_SHARE = 0.1  # a codebook that is more of the stored bytes than this never paid
_CENTROID_BITS = 8
_RANK_SHARE = 0.2  # of the bytes of a candidate, tried for the compensation of the coarse ones
_FACTOR_BITS = (4, 8)
_COARSE = 1.2  # bits a weight up to which a compensation is tried: above, finer segments took every comparison


def candidates(shape: tuple[int, int], value_bits: int) -> Iterator[SwscSpec]:
    """Specs in the metric of the activations that fit an m×n matrix, in no particular order."""
    for size, widths in _LABEL_BITS.items():
        for width in widths:
            spec = SwscSpec(
                1 << width, 0, segment_size=size, scaled=True, metric="activations", feedback=True,
                centroid_bits=_CENTROID_BITS,
            )  # fmt: skip
            family = [spec] + ([replace(spec, channel_axis="input")] if (size, width) in _INPUT_AXIS else [])
            for member in family:
                if member.shape_error(shape) is None and _modest(member, shape, value_bits):
                    yield member
                    yield from _compensated(member, shape, value_bits)


def _modest(spec: SwscSpec, shape: tuple[int, int], value_bits: int) -> bool:
    codebook = spec.n_clusters * (spec.segment_size or 1) * _CENTROID_BITS / 8
    return codebook <= _CODEBOOK_SHARE * spec.stored_bytes(shape, value_bits)


def _compensated(spec: SwscSpec, shape: tuple[int, int], value_bits: int) -> Iterator[SwscSpec]:
    nbytes = spec.stored_bytes(shape, value_bits)
    if 8 * nbytes > _COARSE * shape[0] * shape[1]:
        return
    for bits in _FACTOR_BITS:
        rank = int(_RANK_SHARE * nbytes * 8 / (bits * sum(shape)))
        if 0 < rank <= min(shape):
            yield replace(spec, rank=rank, factor_bits=bits)


@lru_cache(maxsize=1024)
def uncompensated(shape: tuple[int, int], value_bits: int) -> tuple[SwscSpec, ...]:
    """The candidates of rank zero, smallest first; cached, because the matrices of a model have few shapes."""
    found = (spec for spec in candidates(shape, value_bits) if spec.rank == 0)
    return tuple(sorted(found, key=lambda spec: spec.stored_bytes(shape, value_bits)))


def largest_within(specs: Iterable[SwscSpec], shape: tuple[int, int], value_bits: int, bits: float) -> SwscSpec | None:
    """The spec of most stored bytes within `bits` bits per weight, or None if all of them are larger.

    Args:
        specs: candidates; of several with equal stored bytes, the first one is returned.
        shape: of the matrix, (m, n).
        value_bits: bits of a value of the storage dtype.
        bits: budget in bits per weight.
    """
    sizes = ((spec.stored_bytes(shape, value_bits), spec) for spec in specs)
    within = [(nbytes, spec) for nbytes, spec in sizes if 8 * nbytes <= bits * shape[0] * shape[1]]
    return max(within, key=lambda pair: pair[0])[1] if within else None
