"""Claims about the first codebook of short segments, and about the search for the nearest centroid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swsc_core.method.weighted_kmeans import nearest, weighted_kmeans


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(1, 300), st.integers(1, 4), st.booleans())
def test_the_nearest_centroid_is_the_first_of_least_cost(
    data: st.DataObject, k: int, n: int, d: int, weighted: bool
) -> None:
    # Small integers: every product and sum is exact in float32, and equal costs are common.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    points, centroids = (torch.randint(-3, 4, (count, d), generator=generator).float() for count in (n, k))
    weights = torch.randint(1, 4, (n, d), generator=generator).float() if weighted else None
    costs = (points[:, None] - centroids).square() * (1.0 if weights is None else weights[:, None])
    expected = costs.sum(dim=2).argmin(dim=1)  # argmin gives the first of equal values
    assert nearest(points, centroids, weights).tolist() == expected.tolist()


def test_blocks_of_points_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(500, 3, generator=generator), torch.randn(16, 3, generator=generator)
    whole = nearest(points, centroids)
    monkeypatch.setattr("swsc_core.method.weighted_kmeans._BLOCK_VALUES", 16 * 7)
    assert torch.equal(nearest(points, centroids), whole)


def test_no_centroid_of_a_codebook_is_left_without_points() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2000, 2, generator=generator) * torch.tensor([100.0, 1.0])
    weights = torch.rand(2000, 2, generator=generator) + 0.5
    centroids = weighted_kmeans(points, weights, 32, generator)
    assert len(nearest(points, centroids, weights).unique()) == 32
