"""Claims about bits: as the paper counts them, and as they are stored."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsc_core import SwscSpec
from swsc_core.allocation.budget import solve_budget
from swsc_core.storage.bits import Geometry, label_bits

LLAMA = (4096, 4096)
AXES = st.sampled_from(["output", "input"])
COUNTS = st.sampled_from(["true", "paper"])


@pytest.mark.parametrize(("clusters", "bits"), [(128, 0.5), (256, 1.0), (512, 2.0)])
def test_average_bits_reproduce_table_2_for_clusters(clusters: int, bits: float) -> None:
    assert SwscSpec(clusters, 0).paper_bits(LLAMA) == bits


@pytest.mark.parametrize(("rank", "bits"), [(64, 0.5), (128, 1.0), (256, 2.0)])
def test_average_bits_reproduce_table_2_for_ranks(rank: int, bits: float) -> None:
    assert SwscSpec(0, rank).paper_bits(LLAMA) == bits


@pytest.mark.parametrize(("bits", "clusters", "rank"), [(3, 384, 192), (2, 256, 128)])
def test_half_and_half_gives_the_papers_numbers(bits: float, clusters: int, rank: int) -> None:
    assert solve_budget(Geometry(*LLAMA, "output"), bits, count="paper") == (clusters, rank)


def test_the_axis_decides_the_cost_of_a_matrix_that_is_not_square() -> None:
    """1024×4096 (a GQA k_proj), k = 256, r = 64: the figures of the design."""
    bits = {
        axis: 8 * SwscSpec(256, 64, axis).stored_bytes((1024, 4096), 16) / (1024 * 4096) for axis in ("output", "input")
    }
    assert bits["output"] == pytest.approx(5.25, abs=0.01)
    assert bits["input"] == pytest.approx(2.26, abs=0.01)


@pytest.mark.parametrize(("clusters", "bits"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9)])
def test_labels_take_ceil_log2_bits(clusters: int, bits: int) -> None:
    assert label_bits(clusters) == bits


@given(
    m=st.integers(8, 5000), n=st.integers(8, 5000), axis=AXES, bits=st.floats(0.3, 12), count=COUNTS,
    share=st.floats(0, 1), width=st.sampled_from([8, 16, 32]),
)  # fmt: skip
def test_a_solved_budget_is_kept_and_one_rank_more_would_break_it(
    m: int,
    n: int,
    axis: Literal["output", "input"],
    bits: float,
    count: Literal["true", "paper"],
    share: float,
    width: int,
) -> None:
    geometry = Geometry(m, n, axis)

    def cost(k: int, r: int) -> float:
        spec = SwscSpec(k, r, axis)
        return spec.paper_bits((m, n)) if count == "paper" else 8 * spec.stored_bytes((m, n), width) / (m * n)

    try:
        k, r = solve_budget(geometry, bits, cluster_share=share, value_bits=width, count=count)
    except ValueError:
        assert min(cost(1, 0) / max(share, 1e-9), cost(0, 1)) > bits  # truly nothing to buy
        return
    assert 0 <= k < geometry.channels
    assert 0 <= r <= min(m, n)
    assert cost(k, r) <= bits
    assert r == min(m, n) or cost(k, r + 1) > bits
    assert k == geometry.channels - 1 or cost(k + 1, 0) > share * bits


def test_the_error_of_a_budget_that_is_too_small_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"0\.001 bits .* 64×64; the least is 0\.25"):
        solve_budget(Geometry(64, 64, "output"), 0.001)


def test_a_share_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster_share 1\.5 is out of range; choose 0 to 1"):
        solve_budget(Geometry(*LLAMA, "output"), 2, cluster_share=1.5)
