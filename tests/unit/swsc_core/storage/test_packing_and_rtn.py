"""Claims about packed integers and round-to-nearest."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swsc_core.storage.packing as packing
from swsc_core import RtnSpec, dequantize, encode, quantize
from swsc_core.storage.packing import pack, packed_bytes, unpack


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(0, 16), count=st.integers(1, 300), seed=st.integers(0, 1000))
def test_unpack_undoes_pack_and_no_bit_is_wasted(bits: int, count: int, seed: int) -> None:
    values = torch.randint(1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), values)


def test_blocks_of_packing_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(8, (1000,), generator=torch.Generator().manual_seed(0))
    whole = pack(values, 3)
    monkeypatch.setattr(packing, "_BLOCK", 64)
    assert torch.equal(pack(values, 3), whole)
    assert torch.equal(unpack(whole, 3, 1000), values)


def test_three_bit_values_by_hand() -> None:
    # 1 + 2·8 + 3·64 = 0b11_010_001 -> first byte 0xD1, the rest of 3 (bit 2) is zero
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0]


def test_value_too_large_for_its_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="span 0 to 8, expected 0 to 7"):
        pack(torch.tensor([0, 8]), 3)


GRANULARITIES = st.sampled_from(["tensor", "channel", "group"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), m=st.integers(1, 12), n=st.integers(1, 40), bits=st.integers(2, 8),
    granularity=GRANULARITIES, group=st.integers(1, 50), symmetric=st.booleans(),
)  # fmt: skip
def test_every_weight_is_within_a_step_and_bytes_are_as_predicted(
    seed: int,
    m: int,
    n: int,
    bits: int,
    granularity: Literal["tensor", "channel", "group"],
    group: int,
    symmetric: bool,
) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    matrix = quantize(weight, bits, granularity=granularity, group_size=group, symmetric=symmetric)
    error = (weight - dequantize(matrix)).abs()
    # A symmetric grid has one step less on the positive side; rounding the zero point costs up to half a step more.
    assert float(error.max()) <= float(matrix.scales.max()) * (1.0 + 1e-4)
    stored = sum(t.numel() * t.element_size() for t in (matrix.codes, matrix.scales, matrix.zero_points))
    assert stored == RtnSpec(bits, granularity, group, symmetric).stored_bytes((m, n), 32)


def test_two_bit_asymmetric_row_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    matrix = quantize(weight, 2)
    assert matrix.scales.tolist() == [1.0]
    assert unpack(matrix.codes, 2, 4).tolist() == [0, 1, 2, 3]
    assert torch.equal(dequantize(matrix), weight)


def test_eight_bits_are_nearly_exact_and_error_shrinks_with_bits() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((weight - dequantize(quantize(weight, bits))).square().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_finer_granularity_never_does_worse_on_rows_of_different_size() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 32)[:, None]

    def error(granularity: Literal["tensor", "channel", "group"]) -> float:
        return float((weight - dequantize(quantize(weight, 3, granularity=granularity, group_size=16))).square().sum())

    assert error("group") < error("channel") < error("tensor")


def test_short_last_group_of_a_row_keeps_to_its_row() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 100.0, 200.0], [0.1, 0.2, 0.3, 5.0, 7.0]])
    matrix = quantize(weight, 8, granularity="group", group_size=3)
    assert matrix.scales.numel() == 4
    torch.testing.assert_close(dequantize(matrix), weight, rtol=0.02, atol=0.02)


def test_zero_rows_and_constant_rows_survive() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-2.0, -2.0]])
    torch.testing.assert_close(dequantize(quantize(weight, 4)), weight)


@pytest.mark.parametrize("bits", [1, 9, -3])
def test_the_error_of_bits_out_of_range_names_the_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"layer7: bits {bits} .* 2 to 8"):
        encode(torch.ones(2, 2), [RtnSpec(bits)], name="layer7")
    with pytest.raises(ValueError, match=f"bits {bits} .* 2 to 8"):
        quantize(torch.ones(2, 2), bits)


def test_the_error_of_a_group_size_out_of_range_names_the_tensor() -> None:
    with pytest.raises(ValueError, match="layer7: group_size 0 is out of range; choose 1 or more"):
        encode(torch.ones(2, 2), [RtnSpec(4, "group", 0)], name="layer7")
