"""A rank's slice of a compressed matrix is that slice of the dense one, and stays compressed."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swsc_core import RtnEntry, RtnSpec, SwscSpec, encode
from swsc_core.compressed.codec import Encoded, require_part_shapes
from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.registry import matrix_of
from swsc_core.method.spec import Spec
from swsc_core.storage.packing import pack, packed_slice, unpack

M, N = 48, 60
SPECS: dict[str, Spec] = {
    "paper, output channels": SwscSpec(9, 4),
    "paper, input channels": SwscSpec(9, 4, "input"),
    "more clusters than a slice has channels": SwscSpec(40, 2),
    "more factors than a slice has rows": SwscSpec(5, 40),
    "compensation alone": SwscSpec(0, 5),
    "neither": SwscSpec(0, 0),
    "one centroid": SwscSpec(1, 2),
    "segments": SwscSpec(16, 0, segment_size=6, scaled=True),
    "segments of input channels": SwscSpec(13, 3, "input", segment_size=8, scaled=True),
    "codebooks": SwscSpec(7, 2, segment_size=10, codebooks=6, scaled=True),
    "codebooks of whole channels": SwscSpec(3, 2, codebooks=4),
    "few bits": SwscSpec(16, 3, segment_size=4, centroid_bits=8, factor_bits=6, scaled=True),
    "few bits, input channels": SwscSpec(16, 3, "input", centroid_bits=6, factor_bits=8),
    "rtn, channels": RtnSpec(3),
    "rtn, groups": RtnSpec(3, "group", 16),
    "rtn, symmetric groups": RtnSpec(5, "group", 20, symmetric=True),
    "rtn, one scale": RtnSpec(4, "tensor"),
}
RANGES = st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20))


@cache
def encoded(name: str) -> Encoded:
    """A random matrix; read only."""
    torch.manual_seed(0)
    return encode(torch.randn(M, N), [SPECS[name]])


def sliced(whole: Encoded, rows: tuple[int, int], columns: tuple[int, int]) -> CompressedMatrix:
    return matrix_of(whole.tensors, whole.entry).slice(rows, columns)


def within(pair: tuple[int, int], length: int) -> tuple[int, int]:
    first = pair[0] % length
    return first, first + 1 + pair[1] % (length - first)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_together_have_the_whole_matrix(name: str, ranks: int) -> None:
    whole = encoded(name)
    for length, dimension in ((M, 0), (N, 1)):
        step = length // ranks
        slices = []
        for first in range(0, length, step):
            rows, columns = ((first, first + step), (0, N)) if dimension == 0 else ((0, M), (first, first + step))
            slices.append(sliced(whole, rows, columns).restore())
        assert torch.allclose(torch.cat(slices, dimension), whole.restored, atol=1e-5)


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(SPECS)), rows=RANGES, columns=RANGES)
def test_any_slice_is_that_of_the_dense_matrix_and_can_be_stored(
    name: str, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    whole, rows, columns = encoded(name), within(rows, M), within(columns, N)
    found = sliced(whole, rows, columns)
    require_part_shapes(found.tensors, found.entry)
    assert torch.allclose(found.restore(), whole.restored[slice(*rows), slice(*columns)], atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_all_of_a_matrix_is_what_is_stored(name: str) -> None:
    whole = encoded(name)
    found = sliced(whole, (0, M), (0, N))
    assert found.entry == whole.entry or isinstance(found.entry, RtnEntry)
    assert all(torch.equal(found.tensors[part], tensor) for part, tensor in whole.tensors.items())


@pytest.mark.parametrize(
    ("name", "rows", "columns", "share"),
    [
        ("segments", (0, M // 2), (0, N), 0.55),
        ("segments", (0, M), (0, N // 2), 0.65),
        ("segments of input channels", (0, M // 2), (0, N), 0.8),
        ("rtn, groups", (0, M // 2), (0, N), 0.51),
        ("rtn, channels", (0, M), (N // 2, N), 0.65),
    ],
)
def test_half_of_a_matrix_takes_about_half_of_the_bytes(
    name: str, rows: tuple[int, int], columns: tuple[int, int], share: float
) -> None:
    torch.manual_seed(0)
    whole = encode(torch.randn(4 * M, 4 * N), [SPECS[name]])
    half = sliced(whole, (4 * rows[0], 4 * rows[1]), (4 * columns[0], 4 * columns[1]))
    size = sum(part.numel() * part.element_size() for part in half.tensors.values())
    assert size < share * whole.stored_bytes


@given(bits=st.integers(1, 16), values=st.lists(st.integers(0, 1), min_size=1, max_size=60), pair=RANGES)
def test_a_slice_of_packed_values_is_packed_on_its_own(bits: int, values: list[int], pair: tuple[int, int]) -> None:
    stream, (first, last) = torch.tensor(values) * ((1 << bits) - 1), within(pair, len(values))
    part = packed_slice(pack(stream, bits), bits, first, last, len(values))
    assert unpack(part, bits, last - first).tolist() == stream[first:last].tolist()
