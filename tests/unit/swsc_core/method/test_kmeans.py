"""Claims about K-Means over whole channels."""

import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from swsc_core import kmeans
from swsc_core.method import pairwise as points_module
from swsc_core.method.pairwise import PointSpace

module = import_module("swsc_core.method.kmeans")  # the package has a function of the same name


def points_of(seed: int, n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def blobs(seed: int, n: int, d: int, centres: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    where = torch.randn(centres, d, generator=generator) * 2
    return where[torch.randint(centres, (n,), generator=generator)] + 0.3 * torch.randn(n, d, generator=generator)


@pytest.fixture(params=["gram", "gemm"])
def either_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the inner products, whatever the size of the points."""
    monkeypatch.setattr(module, "use_gram", lambda *_: request.param == "gram")
    return str(request.param)


@pytest.mark.usefixtures("either_route")
class TestEitherRoute:
    def test_four_points_by_hand(self) -> None:
        points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
        result = kmeans(points, 2)
        assert sorted(result.centroids.tolist()) == [[0.0, 1.0], [10.0, 1.0]]
        assert result.labels[0] == result.labels[1] != result.labels[2] == result.labels[3]
        assert result.inertia == pytest.approx(4.0)
        assert result.converged

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), n=st.integers(2, 60), d=st.integers(1, 12), data=st.data())
    def test_inertia_never_grows_over_the_iterations(self, seed: int, n: int, d: int, data: st.DataObject) -> None:
        k = data.draw(st.integers(1, n))
        history = kmeans(points_of(seed, n, d), k, n_init=1, seed=seed).inertia_history
        scale = float(points_of(seed, n, d).square().sum())
        assert all(later <= earlier + 1e-5 * scale for earlier, later in itertools.pairwise(history))

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), n=st.integers(2, 60), d=st.integers(1, 12), data=st.data())
    def test_each_centroid_is_the_mean_of_its_members(self, seed: int, n: int, d: int, data: st.DataObject) -> None:
        points = points_of(seed, n, d)
        result = kmeans(points, data.draw(st.integers(1, n)), n_init=2, seed=seed)
        for label, centroid in enumerate(result.centroids):
            members = points[result.labels == label].double()
            assert len(members) > 0
            torch.testing.assert_close(centroid, members.mean(dim=0).float())
        reached = float((points - result.centroids[result.labels]).double().square().sum())
        assert result.inertia == pytest.approx(reached, rel=1e-5, abs=1e-9)

    def test_same_seed_gives_the_same_bytes(self) -> None:
        points = points_of(3, 200, 20)
        one, other = (kmeans(points, 17, seed=5) for _ in range(2))
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.centroids, other.centroids)

    @pytest.mark.parametrize("distinct", [torch.eye(3), points_of(7, 3, 30), 1000 + points_of(8, 3, 5)])
    def test_duplicate_points_use_no_more_clusters_than_there_are_distinct_points(self, distinct: torch.Tensor) -> None:
        points = distinct.repeat(4, 1)
        result = kmeans(points, 8)
        assert result.centroids.shape == distinct.shape
        torch.testing.assert_close(result.centroids[result.labels], points)

    def test_as_many_clusters_as_points_restore_every_point(self) -> None:
        points = points_of(1, 30, 5)
        result = kmeans(points, 30)
        torch.testing.assert_close(result.centroids[result.labels], points)

    def test_one_cluster_is_the_mean(self) -> None:
        points = points_of(1, 30, 5)
        result = kmeans(points, 1)
        torch.testing.assert_close(result.centroids[0], points.mean(dim=0))
        assert torch.equal(result.labels, torch.zeros(30, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("points", "k"),
        [
            pytest.param(points_of(0, 400, 60), 40, id="random"),
            pytest.param(points_of(1, 192, 576), 18, id="random in the shape of a k_proj"),
            pytest.param(blobs(0, 600, 32, 40), 40, id="clustered, as many clusters as there are"),
            pytest.param(blobs(1, 600, 32, 60), 30, id="clustered, half as many"),
            pytest.param(blobs(2, 600, 8, 40), 10, id="clustered in few dimensions, a quarter as many"),
            pytest.param(blobs(3, 600, 8, 60), 59, id="clustered in few dimensions, one less"),
        ],
    )
    def test_inertia_is_within_a_hundredth_of_scikit_learns_best_of_ten(self, points: torch.Tensor, k: int) -> None:
        theirs = KMeans(k, n_init=10, random_state=0).fit(points.numpy()).inertia_
        assert kmeans(points, k).inertia <= 1.01 * theirs

    def test_the_points_are_not_changed(self) -> None:
        points = points_of(2, 50, 8)
        before = points.clone()
        kmeans(points, 5)
        assert torch.equal(points, before)


def test_empty_cluster_takes_the_farthest_point_of_a_cluster_that_can_spare_it() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    distances = torch.tensor([0.1, 0.5, 0.2, 9.0])  # the farthest is alone in its cluster and stays
    assert module._fill_empty(labels, distances, 3).tolist() == [0, 2, 0, 1]


def test_a_far_offset_does_not_cost_the_clustering_its_digits() -> None:
    points = blobs(0, 200, 8, 5)
    near, far = kmeans(points, 5), kmeans(points + 1000, 5)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_the_error_of_a_number_of_clusters_out_of_range_names_the_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"n_clusters {k} is out of range; choose 1 to 10"):
        kmeans(torch.zeros(10, 2), k)


@pytest.mark.parametrize(("small", "starts"), [(300 * 30, 16), (300 * 30 - 1, 4)])
def test_small_problems_have_sixteen_starts_and_large_ones_four(
    small: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", small)
    points = points_of(5, 300, 3)
    assert kmeans(points, 30).inertia == kmeans(points, 30, n_init=starts).inertia
    assert kmeans(points, 30).inertia != kmeans(points, 30, n_init=20 - starts).inertia


def test_sums_by_products_are_those_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that CUDA takes, on the CPU, in more than one block."""
    monkeypatch.setattr(points_module, "_BLOCK_VALUES", 64)
    rows, labels = points_of(6, 50, 4), torch.randint(9, (50,), generator=torch.Generator().manual_seed(1))
    by_products = points_module._add_one_hot_products(torch.zeros(9, 4), rows, labels)
    torch.testing.assert_close(by_products, points_module.sum_by_label(rows, labels, 9))


def test_both_routes_return_equal_labels_and_costs() -> None:
    points = points_of(4, 300, 40)
    points -= points.mean(dim=0)
    labels = torch.randint(20, (300,), generator=torch.Generator().manual_seed(0))
    labels[labels == 7] = 8  # an empty cluster
    gram, gemm = PointSpace(points, gram=True), PointSpace(points, gram=False)
    for one, other in zip(gram.nearest_mean(labels, 20), gemm.nearest_mean(labels, 20), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gram.merge_costs(labels, 20), gemm.merge_costs(labels, 20), rtol=1e-3, atol=1e-3)
    rows = torch.tensor([3, 250])
    torch.testing.assert_close(gram.distances_from(rows), gemm.distances_from(rows))
