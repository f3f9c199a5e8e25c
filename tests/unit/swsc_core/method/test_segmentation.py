"""Claims about sharing in the metric of the activations, by segments, with error feedback and low-bit values."""

import itertools
import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swsc_core import Metric, SwscSpec, compress, decode, encode, restore
from swsc_core.checks import InvalidWeightError
from swsc_core.compressed.registry import entry_of
from swsc_core.method.codebook_fit import CodebookFit

Axis = Literal["output", "input"]
SEGMENTED = SwscSpec(
    8, 0, segment_size=2, scaled=True, metric="activations", feedback=True, rounds=3, centroid_bits=8, factor_bits=8
)


def weight_of(seed: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def hessian_of(seed: int, n: int) -> torch.Tensor:
    """Second moment of correlated inputs, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.logspace(-1, 1, n)
    inputs = torch.randn(4 * n, n, generator=generator) @ mixing
    return inputs.T @ inputs


def relative(weight: torch.Tensor, spec: SwscSpec, metric: Metric) -> float:
    stats = encode(weight, [spec], metric=metric).stats
    return float(stats["energy"] / stats["weight_energy"])


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("bits", [None, 8, 6, 4])
def test_stored_parts_are_counted_exactly_and_decode_to_what_was_restored(
    axis: Axis, codebooks: int, rank: int, bits: int | None
) -> None:
    spec = replace(SEGMENTED, channel_axis=axis, codebooks=codebooks, rank=rank, centroid_bits=bits, factor_bits=bits)
    weight = weight_of(0, 12, 20).bfloat16()
    encoded = encode(weight, [spec], metric=Metric(hessian_of(1, 20)), name="layer")
    assert encoded.stored_bytes == spec.stored_bytes((12, 20), 16)
    assert torch.equal(
        decode(encoded.tensors, entry_of(json.loads(json.dumps(encoded.entry.to_json())))), encoded.restored
    )


def test_restored_segments_are_scaled_centroids_by_label_by_hand() -> None:
    weight, spec = weight_of(2, 6, 8), replace(SEGMENTED, centroid_bits=None, rank=2, factor_bits=None)
    encoded = encode(weight, [spec], metric=Metric(hessian_of(3, 8)))
    parts = encoded.tensors
    stream = "".join(f"{byte:08b}"[::-1] for byte in parts["labels"].tolist())
    labels = [int(stream[i : i + 3][::-1], 2) for i in range(0, 3 * 24, 3)]
    segments = parts["weight"][labels].reshape(6, 8)
    by_hand = segments * parts["scales"][:, None] + parts["left"].T @ parts["right"]
    torch.testing.assert_close(encoded.restored, by_hand)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 500), axis=st.sampled_from(["output", "input"]), plain=st.booleans(), rows=st.booleans(),
    size=st.sampled_from([1, 2, 4]), scaled=st.booleans(),
)  # fmt: skip
def test_reassigning_and_refitting_never_raise_the_weighted_error(
    seed: int, axis: Axis, plain: bool, rows: bool, size: int, scaled: bool
) -> None:
    weight = weight_of(seed, 12, 16)
    importance = torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.1 if rows else None
    metric = Metric(None if plain else hessian_of(seed + 1, 16), importance)
    spec = SwscSpec(4, 0, axis, segment_size=size, scaled=scaled)
    fit = CodebookFit(weight, metric, spec, torch.float32)
    fit.start(weight, torch.Generator().manual_seed(seed))
    fit.assign(weight, feedback=True)
    errors = [metric.weighted_error(weight - fit.clustered())]
    for step in [fit.reassign, fit.refit] * 3:
        step(weight)
        errors.append(metric.weighted_error(weight - fit.clustered()))
    limit = 1e-5 * metric.weighted_error(weight)
    assert all(later <= earlier + limit for earlier, later in itertools.pairwise(errors))


def test_each_step_of_the_family_lowers_the_weighted_error_at_equal_labels() -> None:
    """Plain metric → activations → error feedback → rounds, on one matrix whose inputs are correlated."""
    weight, metric = weight_of(5, 48, 64), Metric(hessian_of(6, 64))
    steps = [
        replace(SEGMENTED, metric="weights", feedback=False, rounds=0),
        replace(SEGMENTED, feedback=False, rounds=0),
        replace(SEGMENTED, rounds=0),
        SEGMENTED,
    ]
    errors = [weight - encode(weight, [spec], metric=metric).restored for spec in steps]
    weighted_errors = [metric.weighted_error(error) for error in errors]
    assert weighted_errors == sorted(weighted_errors, reverse=True)
    assert weighted_errors[-1] < 0.6 * weighted_errors[0]


def test_whole_channels_in_the_whitened_space_beat_the_papers_form_in_the_metric() -> None:
    weight, metric = weight_of(7, 40, 32), Metric(hessian_of(8, 32))
    paper, whitened = SwscSpec(8, 4), SwscSpec(8, 4, metric="activations")
    weighted_errors = [
        metric.weighted_error(weight - encode(weight, [s], metric=metric).restored) for s in (paper, whitened)
    ]
    assert weighted_errors[1] < 0.5 * weighted_errors[0]


def test_the_plain_metric_given_explicitly_is_the_papers_form() -> None:
    """One implementation: with H = I whitening, feedback and refits change nothing but rounding."""
    weight = weight_of(9, 30, 24)
    paper = restore(compress(weight, SwscSpec(6, 3))[0], torch.float32)
    identity = Metric(torch.eye(24))
    same = restore(compress(weight, SwscSpec(6, 3, metric="activations"), metric=identity)[0], torch.float32)
    torch.testing.assert_close(same, paper, rtol=1e-4, atol=1e-4)


def test_whitened_svd_meets_the_eckart_young_bound_of_its_metric() -> None:
    weight, metric = weight_of(10, 20, 16), Metric(hessian_of(11, 16), torch.rand(20) + 0.5)
    left_over = weight - encode(weight, [SwscSpec(0, 5, metric="activations")], metric=metric).restored
    spectrum = torch.linalg.svdvals(metric.whiten_(weight.clone()).double())
    assert metric.weighted_error(left_over) == pytest.approx(float(spectrum[5:].square().sum()), rel=1e-3)


def test_alternating_with_the_svd_does_not_lose() -> None:
    weight, metric = weight_of(12, 32, 32), Metric(hessian_of(13, 32))
    once, often = (relative(weight, replace(SEGMENTED, rank=3, rounds=rounds), metric) for rounds in (0, 4))
    assert often < once


def test_more_rounds_never_end_worse() -> None:
    weight, metric = weight_of(14, 24, 24), Metric(hessian_of(15, 24))
    weighted_errors = [
        relative(weight, replace(SEGMENTED, centroid_bits=4, rounds=rounds), metric) for rounds in range(5)
    ]
    assert weighted_errors == sorted(weighted_errors, reverse=True)


def test_feedback_matches_its_definition_column_by_column() -> None:
    """Against GPTQ's loop written out, scalars for segments, in float64; the last column is the first."""
    weight, hessian = weight_of(16, 3, 6), hessian_of(17, 6)
    metric = Metric(hessian)
    fit = CodebookFit(weight, metric, SwscSpec(4, 0, segment_size=1), torch.float32)
    fit.start(weight, torch.Generator().manual_seed(0))
    fit.assign(weight, feedback=True)
    assert metric.hessian is not None
    upper = torch.linalg.cholesky(torch.linalg.inv(metric.hessian.double().flip(0, 1)), upper=True)
    centroids, work = fit.centroids.expand().double()[:, 0], weight.double().flip(1)
    for column in range(6):
        labels = (work[:, column, None] - centroids).abs().argmin(dim=1)
        assert labels.tolist() == fit.labels[:, 5 - column].tolist()
        error = (work[:, column] - centroids[labels]) / upper[column, column]
        work[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]


def test_slabs_and_lazy_updates_change_nothing_but_rounding() -> None:
    weight, metric = weight_of(18, 24, 32), Metric(hessian_of(19, 32))
    fits = [
        CodebookFit(weight, metric, SEGMENTED, torch.float32),
        CodebookFit(weight, metric, SEGMENTED, torch.float32, slab_weights=32 * 5, lazy_columns=6),
    ]
    for fit in fits:
        fit.start(weight, torch.Generator().manual_seed(0))
        fit.assign(weight, feedback=True)
        fit.refit(weight)
        fit.reassign(weight)
    whole, parts = fits
    assert parts.weighted_error(weight) == pytest.approx(whole.weighted_error(weight), rel=0.05)
    difference = metric.weighted_error(parts.clustered() - whole.clustered())
    assert difference < 0.2 * metric.weighted_error(weight)


def test_rows_that_matter_more_are_kept_better() -> None:
    weight, hessian = weight_of(20, 16, 32), hessian_of(21, 32)
    importance = torch.ones(16)
    importance[:4] = 100
    even, uneven = (
        weight - encode(weight, [replace(SEGMENTED, scaled=False)], metric=Metric(hessian, rows)).restored
        for rows in (None, importance)
    )
    plain = Metric(hessian)
    assert plain.weighted_error(uneven[:4]) < plain.weighted_error(even[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_size": 3}, "w: segment_size 3 does not divide its output channels of 8; choose a divisor"),
        ({"codebooks": 4}, "w: codebooks 4 do not divide its 6 rows into whole segments; choose a divisor"),
        ({"n_clusters": 25}, "w: n_clusters 25 is out of range; choose 0 to 24"),
        ({"rank": 7}, "w: rank 7 is out of range; choose 0 to 6"),
    ],
)
def test_the_error_of_a_spec_that_does_not_fit_names_one_that_does(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(torch.ones(6, 8), replace(SEGMENTED, **change), metric=Metric(torch.eye(8)), name="w")


def test_a_missing_or_empty_hessian_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"w: metric activations needs .*"):
        compress(torch.ones(4, 4), SEGMENTED, name="w")
    for hessian, reason in ((torch.zeros(4, 4), "zero"), (torch.full((4, 4), torch.nan), "nan")):
        with pytest.raises(InvalidWeightError, match=f"^w: .*{reason}.*exclude this tensor"):
            Metric(hessian, name="w")


def test_fewer_distinct_segments_than_centroids_are_kept_exactly() -> None:
    weight = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 1.0, 2.0]]).repeat(4, 1)
    spec = SwscSpec(8, 0, segment_size=2)
    assert torch.equal(encode(weight, [spec]).restored, weight)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_zero_matrix_stays_zero_in_any_metric(axis: Axis) -> None:
    spec = replace(SEGMENTED, channel_axis=axis, rank=1)
    restored = encode(torch.zeros(6, 8), [spec], metric=Metric(hessian_of(1, 8))).restored
    assert not restored.any()


def test_few_tokens_are_trusted_less() -> None:
    """A Hessian of fewer tokens than inputs has no information on most directions.

    Error there must still cost something.
    """
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(-1, 0.5, 64)
    truth, weight = Metric(mixing @ mixing.T), weight_of(22, 48, 64)
    inputs = torch.randn(32, 64, generator=generator) @ mixing.T
    spec = replace(SEGMENTED, n_clusters=16)
    trusting, careful = (
        truth.weighted_error(weight - encode(weight, [spec], metric=Metric(inputs.T @ inputs, tokens=tokens)).restored)
        for tokens in (None, 32)
    )
    assert careful < 0.8 * trusting


def test_the_error_of_a_hessian_without_a_root_names_its_tensor() -> None:
    hessian = torch.eye(8)
    hessian[0, 0] = -5.0  # its mean is positive, it is not
    with pytest.raises(InvalidWeightError, match=r"q_proj: .* not positive definite"):
        _ = Metric(hessian, name="q_proj").root
