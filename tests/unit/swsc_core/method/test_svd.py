"""Claims about the truncated SVD."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swsc_core.method.svd as module
from swsc_core import kmeans, truncated_svd
from swsc_core.method.svd import svd_by_eigenvectors


def matrix_of(seed: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def squared_error(matrix: torch.Tensor, rank: int) -> float:
    low_rank = truncated_svd(matrix, rank)
    return float((matrix - low_rank.left @ low_rank.right).double().square().sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 40), n=st.integers(1, 40), data=st.data())
def test_error_meets_the_eckart_young_bound(seed: int, m: int, n: int, data: st.DataObject) -> None:
    matrix = matrix_of(seed, m, n)
    rank = data.draw(st.integers(0, min(m, n)))
    optimum = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())
    assert squared_error(matrix, rank) <= optimum * (1 + 1e-4) + 1e-8 * float(matrix.square().sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(2, 30), n=st.integers(2, 30))
def test_error_never_grows_with_rank(seed: int, m: int, n: int) -> None:
    matrix = matrix_of(seed, m, n)
    errors = [squared_error(matrix, rank) for rank in range(min(m, n) + 1)]
    assert all(later <= earlier + 1e-5 * errors[0] for earlier, later in itertools.pairwise(errors))


def test_full_rank_restores_to_rounding() -> None:
    matrix = matrix_of(0, 20, 33)
    low_rank = truncated_svd(matrix, 20)
    torch.testing.assert_close(low_rank.left @ low_rank.right, matrix, rtol=1e-4, atol=1e-5)


def test_rank_zero_is_empty_and_adds_nothing() -> None:
    low_rank = truncated_svd(matrix_of(0, 5, 7), 0)
    assert low_rank.left.shape == (5, 0)
    assert low_rank.right.shape == (0, 7)
    assert torch.equal(low_rank.left @ low_rank.right, torch.zeros(5, 7))


def test_factors_share_the_singular_values_evenly() -> None:
    matrix = matrix_of(1, 12, 9)
    low_rank, s = truncated_svd(matrix, 4), torch.linalg.svdvals(matrix)[:4]
    torch.testing.assert_close(low_rank.left.square().sum(dim=0), s)
    torch.testing.assert_close(low_rank.right.square().sum(dim=1), s)


@pytest.mark.parametrize("rank", [1, 16, 100])
def test_block_krylov_is_within_a_thousandth_of_the_optimum_on_a_flat_spectrum(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXACT_SIDE", 0)
    matrix = matrix_of(2, 500, 700)
    clustering = kmeans(matrix, 40, n_init=1)
    error = matrix - clustering.centroids[clustering.labels]
    optimum = float(torch.linalg.svdvals(error.double())[rank:].square().sum())
    assert truncated_svd(error, rank).solver == "randomised"
    assert squared_error(error, rank) <= 1.001 * optimum


@pytest.mark.parametrize("matrix", [torch.zeros(300, 400), torch.ones(300, 400), torch.eye(400)[:300]])
def test_block_krylov_survives_matrices_of_little_or_no_structure(
    matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXACT_SIDE", 0)
    optimum = float(torch.linalg.svdvals(matrix.double())[30:].square().sum())
    assert squared_error(matrix, 30) <= 1.001 * optimum + 1e-9 * float(matrix.square().sum())
    assert torch.isfinite(truncated_svd(matrix, 30).left).all()


def test_same_seed_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXACT_SIDE", 0)
    matrix = matrix_of(3, 300, 300)
    assert torch.equal(truncated_svd(matrix, 20, seed=1).left, truncated_svd(matrix, 20, seed=1).left)


@pytest.mark.parametrize("rank", [-1, 6])
def test_the_error_of_a_rank_out_of_range_names_the_range(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is out of range; choose 0 to 5"):
        truncated_svd(torch.zeros(5, 7), rank)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("rank", [0, 3, 30])
def test_eigenvectors_give_the_svd_that_a_gpu_is_slow_at(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    u, s, vh = svd_by_eigenvectors(matrix)
    assert u.shape == (shape[0], min(shape))
    assert vh.shape == (min(shape), shape[1])
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=1e-5, atol=1e-4)
    assert not torch.isnan(u).any()
    assert not torch.isnan(vh).any()
