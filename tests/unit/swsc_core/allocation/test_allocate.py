"""Claims about dividing a budget, about candidate specs, and about predicted losses."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swsc_core import Metric, SwscSpec, compress
from swsc_core.allocation import sensitivity as curve
from swsc_core.allocation.allocate import Choice, allocate, equal_shares, lower_hull
from swsc_core.allocation.candidate_specs import candidates, largest_within, uncompensated
from swsc_core.allocation.sensitivity import relative_distortion, sensitivity

SPEC = SwscSpec(2, 0)


def curve_of(points: list[tuple[int, float]]) -> list[Choice]:
    return [Choice(SPEC, nbytes, loss) for nbytes, loss in points]


CURVES = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=5).map(
        curve_of
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(curves=CURVES, budget=st.integers(0, 120))
def test_a_budget_is_kept_and_little_worse_than_the_best_of_all_combinations(
    curves: list[list[Choice]], budget: int
) -> None:
    within = [c for c in itertools.product(*curves) if sum(choice.nbytes for choice in c) <= budget]
    if not within:
        with pytest.raises(ValueError, match="smallest choices"):
            allocate(curves, budget)
        return
    chosen = allocate(curves, budget)
    assert sum(choice.nbytes for choice in chosen) <= budget
    best = min(sum(choice.loss for choice in combination) for combination in within)
    # A Lagrangian solution is as far from the optimum as its worst single step at the most.
    step = max(max(c.loss for c in curve) - min(c.loss for c in curve) for curve in curves)
    assert sum(choice.loss for choice in chosen) <= best + step + 1e-9


@given(curve=CURVES.map(lambda curves: curves[0]))
def test_a_hull_falls_ever_more_slowly(curve: list[Choice]) -> None:
    hull = lower_hull(curve)
    gains = [(a.loss - b.loss) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
    assert all(gain > 0 for gain in gains)
    assert all(later < earlier + 1e-9 for earlier, later in itertools.pairwise(gains))
    assert hull[-1].loss == min(choice.loss for choice in curve)


def test_bits_go_where_they_matter() -> None:
    curves = [curve_of([(10, loss), (20, loss / 4), (30, loss / 16)]) for loss in (1.0, 100.0)]
    assert [choice.nbytes for choice in allocate(curves, 40)] == [10, 30]


def test_equal_shares_keep_the_budget_where_one_matrix_cannot_be_as_small_as_the_others() -> None:
    assert equal_shares([100, 900], [10, 100], 250) == [25, 225]
    assert equal_shares([100, 900], [40, 100], 250) == [40, 210]
    dear_once_the_first_has_its_share = 66
    assert equal_shares([100, 900, 300], [40, 100, dear_once_the_first_has_its_share], 265) == [40, 159, 66]
    assert equal_shares([3, 7], [3, 7], 10) == [3, 7]


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (4096, 11008), (96, 64)])
def test_the_menu_spans_half_a_bit_to_eight_and_fits(shape: tuple[int, int]) -> None:
    specs = list(candidates(shape, 16))
    for spec in specs:
        spec.require_shape("weight", shape)
    bits = sorted(8 * spec.stored_bytes(shape, 16) / (shape[0] * shape[1]) for spec in specs)
    assert bits[0] < 1 or shape == (96, 64)  # of a tiny matrix every codebook is a large part
    assert bits[0] < 2.5
    assert bits[-1] > 4
    assert len(set(specs)) == len(specs)


def test_the_largest_candidate_within_the_bits_is_the_first_of_those_of_equal_size() -> None:
    shape = (512, 512)
    specs = uncompensated(shape, 16)
    sizes = [spec.stored_bytes(shape, 16) for spec in specs]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < len(sizes), "segments along rows and down columns take equal bytes"
    for nbytes in set(sizes):
        bits = 8 * nbytes / (shape[0] * shape[1])
        assert largest_within(specs, shape, 16, bits) is specs[sizes.index(nbytes)]
        assert largest_within(specs, shape, 16, bits + 1e-9) is specs[sizes.index(nbytes)]
    assert largest_within(specs, shape, 16, 8 * sizes[0] / 512**2 - 1e-9) is None


def test_the_loss_predicted_from_some_rows_is_near_that_of_a_compression() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator) * (torch.rand(512, 1, generator=generator) + 0.1)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(-0.5, 0.5, 64)
    metric = Metric(mixing @ mixing.T, torch.rand(512, generator=generator))
    for clusters, size in ((16, 4), (16, 2), (64, 2)):
        spec = SwscSpec(clusters, 0, segment_size=size, scaled=True, metric="activations", feedback=True)
        predicted = relative_distortion(weight[:256], spec, metric.of_rows(torch.arange(256)), 0, "w") * sensitivity(
            weight, metric
        )
        assert predicted == pytest.approx(compress(weight, spec, metric=metric)[1].weighted_error, rel=0.2)


@pytest.mark.parametrize("columns", [90, 96])
def test_every_spec_of_the_menu_has_a_share_of_a_tall_and_narrow_matrix(columns: int) -> None:
    """Segments that run down the columns need a number of rows that they divide."""
    weight, metric = torch.randn(1000, columns), Metric(torch.eye(columns))
    specs = [spec for spec in candidates((1000, columns), 16) if spec.rank == 0]
    assert any(spec.channel_axis == "input" for spec in specs)
    assert all(0 < relative_distortion(weight, spec, metric, 0, "w") < 1 for spec in specs)


def test_reach_is_the_same_sum_however_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric = torch.randn(40, 8).bfloat16(), Metric(torch.eye(8), torch.rand(40))
    whole = sensitivity(weight, metric)
    monkeypatch.setattr(curve, "_SLAB_ROWS", 7)
    assert sensitivity(weight, metric) == whole == sensitivity(weight.float(), metric)
