"""Claims about SWSC on one matrix, and about the one door to all methods."""

import itertools
import json
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swsc_core import RtnSpec, SwscSpec, compress, decode, encode, restore
from swsc_core.checks import InvalidWeightError
from swsc_core.compressed.registry import entry_of
from swsc_core.storage.bits import label_bits
from swsc_core.storage.packing import unpack

AXES = ("output", "input")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def weight_of(seed: int, m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_is_centroids_by_label_plus_left_times_right(
    axis: Literal["output", "input"], dtype: torch.dtype
) -> None:
    weight = weight_of(0, 24, 40, dtype)
    matrix, _ = compress(weight, SwscSpec(6, 5, axis))
    channels = 24 if axis == "output" else 40
    labels = unpack(matrix.labels, label_bits(6), channels)
    shared = matrix.centroids.expand()[labels]
    by_hand = (shared if axis == "output" else shared.T) + matrix.left.expand().T @ matrix.right.expand()
    assert {matrix.centroids.data.dtype, matrix.left.data.dtype, matrix.right.data.dtype} == {dtype}
    assert torch.equal(restore(matrix, dtype).float(), by_hand.to(dtype).float())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), m=st.integers(2, 20), n=st.integers(2, 20), axis=st.sampled_from(AXES), data=st.data()
)
def test_error_never_grows_with_rank(
    seed: int, m: int, n: int, axis: Literal["output", "input"], data: st.DataObject
) -> None:
    weight = weight_of(seed, m, n)
    k = data.draw(st.integers(0, m if axis == "output" else n))

    def error(rank: int) -> float:
        matrix, _ = compress(weight, SwscSpec(k, rank, axis, n_init=1))
        return float((weight - restore(matrix, torch.float32)).square().sum())

    errors = [error(rank) for rank in range(min(m, n) + 1)]
    tolerance = 1e-5 * float(weight.square().sum())
    assert all(later <= earlier + tolerance for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= tolerance  # full rank restores


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("k", "rank"), [(0, 3), (1, 3), (4, 0), (7, 2)])
def test_stored_bytes_are_those_of_the_spec(axis: Literal["output", "input"], k: int, rank: int) -> None:
    weight = weight_of(1, 18, 26, torch.bfloat16)
    spec = SwscSpec(k, rank, axis)
    encoded = encode(weight, [spec])
    assert encoded.stored_bytes == spec.stored_bytes((18, 26), 16)


def test_no_clusters_is_the_pure_svd_of_the_weight() -> None:
    weight = weight_of(2, 16, 12)
    matrix, _ = compress(weight, SwscSpec(0, 4))
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(restore(matrix, torch.float32), (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)


def test_clusters_without_compensation_are_the_means_of_their_channels() -> None:
    weight = torch.tensor([[1.0, 1.0], [3.0, 3.0], [10.0, 0.0]])
    matrix, _ = compress(weight, SwscSpec(2, 0))
    assert torch.equal(restore(matrix, torch.float32), torch.tensor([[2.0, 2.0], [2.0, 2.0], [10.0, 0.0]]))


def test_the_error_is_taken_against_the_centroids_as_they_are_stored() -> None:
    """So that the SVD makes up for their rounding too: here two bits of mantissa."""
    weight = weight_of(3, 12, 12) * 1000
    matrix, stats = compress(weight, SwscSpec(3, 0), storage_dtype=torch.float8_e5m2)
    rounded = float((weight - restore(matrix, torch.float32)).double().square().sum())
    assert stats.cluster_error == pytest.approx(rounded, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_values_that_overflow_the_storage_dtype_name_the_tensor_and_the_remedy(rank: int) -> None:
    weight = (weight_of(3, 12, 12) * 1e6).bfloat16()
    with pytest.raises(InvalidWeightError, match=r"layer: .* overflow .*float16"):
        encode(weight, [SwscSpec(3, rank)], name="layer", storage_dtype=torch.float16)


@pytest.mark.parametrize(
    "spec", [SwscSpec(4, 2, "input"), RtnSpec(3), RtnSpec(2, "group", 5), RtnSpec(4, "tensor", 1, True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_gives_what_encode_restored_from_plain_json(spec: Any, dtype: torch.dtype) -> None:
    encoded = encode(weight_of(4, 12, 14, dtype), [spec], name="layer", seed=1)
    again = decode(encoded.tensors, entry_of(json.loads(json.dumps(encoded.entry.to_json()))))
    assert again.dtype == dtype
    assert torch.equal(again.float(), encoded.restored.float())


def test_auto_axis_keeps_the_smaller_error() -> None:
    columns = weight_of(5, 3, 40)[torch.randint(3, (30,), generator=torch.Generator().manual_seed(0))].T.contiguous()
    specs = [SwscSpec(3, 0, "output"), SwscSpec(3, 0, "input")]  # columns repeat, rows do not
    assert encode(columns, specs).spec == specs[1]
    assert encode(columns.T.contiguous(), specs).spec == specs[0]


def test_the_name_and_the_runs_seed_decide_the_bytes() -> None:
    weight = weight_of(6, 60, 60)

    def labels(name: str, seed: int) -> list[int]:
        return compress(weight, SwscSpec(20, 0, n_init=1), name=name, seed=seed)[0].labels.tolist()

    assert labels("a", 0) == labels("a", 0)
    assert labels("a", 0) != labels("b", 0)
    assert labels("a", 0) != labels("a", 1)


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 2), (float("inf"), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_non_finite_weights_name_the_tensor_and_the_count(value: float, count: int, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4)
    weight.view(-1)[:count] = value
    for spec in (SwscSpec(2, 1), RtnSpec(3)):
        with pytest.raises(InvalidWeightError, match=f"layer.q: {count} of 16 values are NaN or Inf"):
            encode(weight.to(dtype), [spec], name="layer.q")


@pytest.mark.parametrize(
    ("k", "rank", "message"),
    [
        (5, 0, "w: n_clusters 5 is out of range; choose 0 to 4"),
        (-1, 0, "w: n_clusters -1 is out of range; choose 0 to 4"),
        (1, 5, "w: rank 5 is out of range; choose 0 to 4"),
    ],
)
def test_the_error_of_numbers_out_of_range_names_the_range(k: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(torch.eye(4), SwscSpec(k, rank), name="w")


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int32)]
)
def test_what_is_not_a_floating_point_matrix_is_refused_by_name(bad: torch.Tensor) -> None:
    with pytest.raises(InvalidWeightError, match=r"norm: .* expected a .*matrix"):
        encode(bad, [SwscSpec(1, 0)], name="norm")


@pytest.mark.parametrize("spec", [SwscSpec(16, 8), RtnSpec(3)])
def test_restored_values_that_overflow_the_dtype_of_the_weight_are_an_error(spec: Any) -> None:
    weight = (weight_of(5, 64, 48) * 40_000).clamp(-65_504, 65_504)  # up to the largest float16
    with pytest.raises(InvalidWeightError, match="layer: restored values overflow float16"):
        encode(weight.half(), [spec], name="layer")


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_weights_of_any_size_are_shared_alike(scale: float) -> None:
    weight = weight_of(4, 24, 20)
    plain, scaled = (encode(w, [SwscSpec(5, 2)], name="layer") for w in (weight, weight * scale))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3)


def test_a_zero_matrix_has_no_error() -> None:
    encoded = encode(torch.zeros(6, 6), [SwscSpec(2, 1)])
    assert encoded.relative_error == 0
