"""Candidate specs for the allocation of a budget, from half a bit to eight bits per weight.

The best segment size at a given rate depends on the shape (a codebook adds little to a large matrix), on the metric and
on the weights. Several candidates are therefore measured at each rate.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from swsc_core.method.spec import SwscSpec

# Segment size -> label bits. Longer segments quantize better at equal rates and need larger codebooks for it.
_LABEL_BITS = {8: (4, 6, 8, 10), 6: (8, 9), 4: (6, 7, 8, 9, 10), 3: (8, 9, 10), 2: (4, 5, 6, 7, 8, 10), 1: (4, 5, 6, 8)}
# Segment sizes and label bits that are also candidates along columns.
_INPUT_AXIS = {(4, 8), (2, 6)}
# Largest share of the stored bytes for a codebook; larger codebooks were never the best candidate.
_CODEBOOK_SHARE = 0.1
_CENTROID_BITS = 8
# Compensation of coarse candidates: bytes relative to those of the candidate, and width of the factors.
_RANK_SHARE = 0.2
_FACTOR_BITS = (4, 8)
# Bits per weight up to which a candidate is coarse. Above, finer segments were better in every comparison.
_COARSE = 1.2


def candidates(shape: tuple[int, int], value_bits: int) -> Iterator[SwscSpec]:
    """Candidates of metric "activations" for a matrix of `shape`, in no particular order."""
    for size, widths in _LABEL_BITS.items():
        for width in widths:
            spec = SwscSpec(
                1 << width,
                0,
                segment_size=size,
                scaled=True,
                metric="activations",
                feedback=True,
                centroid_bits=_CENTROID_BITS,
            )
            axes = [spec, replace(spec, channel_axis="input")] if (size, width) in _INPUT_AXIS else [spec]
            for candidate in axes:
                if _fits(candidate, shape) and _has_small_codebook(candidate, shape, value_bits):
                    yield candidate
                    yield from _compensated(candidate, shape, value_bits)


def _fits(spec: SwscSpec, shape: tuple[int, int]) -> bool:
    try:
        spec.require_shape("weight", shape)
    except ValueError:
        return False
    return True


def _has_small_codebook(spec: SwscSpec, shape: tuple[int, int], value_bits: int) -> bool:
    codebook_bytes = spec.n_clusters * (spec.segment_size or 1) * _CENTROID_BITS / 8
    return codebook_bytes <= _CODEBOOK_SHARE * spec.stored_bytes(shape, value_bits)


def _compensated(spec: SwscSpec, shape: tuple[int, int], value_bits: int) -> Iterator[SwscSpec]:
    """A coarse candidate with a low-rank compensation; none for a finer candidate."""
    nbytes = spec.stored_bytes(shape, value_bits)
    if 8 * nbytes > _COARSE * shape[0] * shape[1]:
        return
    for bits in _FACTOR_BITS:
        rank = int(_RANK_SHARE * nbytes * 8 / (bits * sum(shape)))
        if 0 < rank <= min(shape):
            yield replace(spec, rank=rank, factor_bits=bits)


@lru_cache(maxsize=1024)
def uncompensated(shape: tuple[int, int], value_bits: int) -> tuple[SwscSpec, ...]:
    """The candidates of rank zero, smallest first. Cached, because the matrices of a model have few shapes."""
    specs = (spec for spec in candidates(shape, value_bits) if spec.rank == 0)
    return tuple(sorted(specs, key=lambda spec: spec.stored_bytes(shape, value_bits)))


def largest_within(specs: Iterable[SwscSpec], shape: tuple[int, int], value_bits: int, bits: float) -> SwscSpec | None:
    """The spec of most stored bytes within `bits` bits per weight, or None if all of them are larger.

    Args:
        specs: candidates; among specs of equal stored bytes, the first is returned.
        shape: of the matrix, (m, n).
        value_bits: bits per value of the storage dtype.
        bits: budget in bits per weight.
    """
    sizes = ((spec.stored_bytes(shape, value_bits), spec) for spec in specs)
    within = [(nbytes, spec) for nbytes, spec in sizes if 8 * nbytes <= bits * shape[0] * shape[1]]
    return max(within, key=lambda pair: pair[0])[1] if within else None
