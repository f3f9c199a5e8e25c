"""From settings to specs: numbers, the paper's budget, both axes, candidates within a budget."""

from typing import Any

import pytest

from pipeline.checkpoints.matrix_info import MatrixInfo, whole_matrix
from pipeline.errors import ConfigError
from pipeline.planning.spec_resolution import Budget, budget_bytes, budget_of, resolve, value_bits
from pipeline.settings.matrix import MatrixSettings
from swsc_core.method.spec import RtnSpec, SwscSpec
from tests.unit.pipeline.planning.test_plan import checkpoint_of

SHAPES: dict[str, tuple[int, ...]] = {"a": (256, 128), "b": (128, 512), "rest": (1000, 128)}
SOURCE = checkpoint_of(SHAPES)
A, B = (whole_matrix(SOURCE.tensors[name]) for name in "ab")


def settings(**given: Any) -> MatrixSettings:
    return MatrixSettings.model_validate(given)


def specs_of(info: MatrixInfo = A, **given: Any) -> tuple[Any, ...]:
    chosen = settings(**given)
    return resolve(info, chosen, budget_of(SOURCE, [A, B], chosen))


def bits_of(spec: Any, info: MatrixInfo) -> float:
    return 8 * spec.stored_bytes(info.shape, 16) / info.count


def test_numbers_are_taken_as_they_are() -> None:
    assert specs_of(clusters=8, rank=2) == (SwscSpec(8, 2),)
    given: dict[str, Any] = {
        "clusters": 16, "segment_size": 4, "codebooks": 2, "scaled": True, "metric": "activations", "feedback": True,
        "rounds": 3, "centroid_bits": 8,
    }  # fmt: skip
    (spec,) = specs_of(**given, channel_axis="input")
    expected = {key: value for key, value in given.items() if key != "clusters"}
    assert spec == SwscSpec(16, 0, "input", **expected)


@pytest.mark.parametrize(
    "given",
    [{"clusters": 256}, {"rank": 129}, {"clusters": 16, "segment_size": 3}, {"clusters": 16, "codebooks": 3},
    {"bits": 0.01}],
)  # fmt: skip
def test_what_does_not_fit_a_matrix_names_it(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^a: "):
        specs_of(**given)


@pytest.mark.parametrize("bits", [16, 30])
@pytest.mark.parametrize("given", [{}, {"count": "paper"}, {"channel_axis": "auto"}, {"preset": "fast"}])
def test_a_budget_that_is_not_below_the_bits_of_the_checkpoint_is_refused(bits: int, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^bits {bits}: .* 16 bits"):
        specs_of(bits=bits, **given)


def test_a_budget_over_the_model_is_refused_where_it_leaves_the_matrices_what_they_take_now() -> None:
    with pytest.raises(ConfigError, match=r"^bits 16 over the model: 16\.000 bits"):
        specs_of(bits=16, preset="fast", bits_over="model")


def test_a_wider_checkpoint_allows_a_wider_budget() -> None:
    source = checkpoint_of(SHAPES, "F32")
    matrices = [whole_matrix(source.tensors[name]) for name in "ab"]
    assert budget_of(source, matrices, settings(bits=30)).bits == 30


@pytest.mark.parametrize("bits", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_budget_of_stored_bytes_is_kept_and_nearly_used(bits: float, axis: str) -> None:
    (spec,) = specs_of(B, bits=bits, channel_axis=axis)
    assert bits_of(spec, B) <= bits < bits_of(SwscSpec(spec.n_clusters, spec.rank + 1, spec.channel_axis), B)


def test_the_default_budget_counts_as_the_paper_does() -> None:
    assert budget_of(SOURCE, [A], settings()) == Budget(3.0, "paper")
    assert budget_of(SOURCE, [A], settings(bits=3)) == Budget(3.0, "true")
    assert budget_of(SOURCE, [A], settings(bits=3, count="paper")) == Budget(3.0, "paper")
    (spec,) = specs_of()
    assert spec.paper_bits(A.shape) <= 3 < bits_of(spec, A) + 0.1


@pytest.mark.parametrize("given", [{"bits": 3}, {"clusters": 32, "rank": 4}])
def test_both_axes_take_about_the_same_bytes(given: dict[str, Any]) -> None:
    first, second = specs_of(B, channel_axis="auto", **given)
    assert (first.channel_axis, second.channel_axis) == ("output", "input")
    assert (first,) == specs_of(B, channel_axis="output", **given)
    assert 0.8 * bits_of(first, B) < bits_of(second, B) <= bits_of(first, B)


def test_codes_of_round_to_nearest_have_whole_bits() -> None:
    assert specs_of(method="rtn") == (RtnSpec(3),)
    assert specs_of(method="rtn", bits=4, granularity="group", group_size=32) == (RtnSpec(4, "group", 32),)


def test_before_allocation_a_matrix_has_the_largest_candidate_within_the_mean_budget() -> None:
    small, large = (specs_of(preset="best", bits=bits)[0] for bits in (3, 5))
    assert bits_of(small, A) <= 3 < bits_of(large, A) <= 5
    assert small.metric == "activations"


def test_over_the_model_what_is_not_compressed_is_paid_first() -> None:
    selected, model = (settings(preset="best", bits=12, bits_over=over) for over in ("selected", "model"))
    assert budget_bytes(SOURCE, [A, B], selected) == int(12 * (A.count + B.count) / 8)
    left = int(12 * SOURCE.weights / 8) - SOURCE.tensors["rest"].nbytes
    assert budget_bytes(SOURCE, [A, B], model) == left
    assert budget_of(SOURCE, [A, B], model) == Budget(8 * left / (A.count + B.count))
    with pytest.raises(ConfigError, match="over the model"):
        budget_of(SOURCE, [A, B], settings(preset="best", bits=8, bits_over="model"))


def test_a_budget_below_the_smallest_candidates_is_refused_with_the_matrix_that_takes_most() -> None:
    with pytest.raises(ConfigError, match=r"\(a, shape \[256, 128\]"):
        budget_of(SOURCE, [A, B], settings(preset="best", bits=0.4))


def test_a_matrix_too_small_for_any_candidate_is_refused_by_name() -> None:
    tiny = whole_matrix(checkpoint_of({"tiny": (2, 3)}).tensors["tiny"])
    with pytest.raises(ConfigError, match=r"^tiny: "):
        budget_of(SOURCE, [tiny], settings(preset="best", bits=3))


@pytest.mark.parametrize(
    ("dtype", "given", "bits"),
    [("BF16", {}, 16), ("F32", {}, 32), ("F8_E4M3", {}, 8), ("F8_E4M3", {"method": "rtn"}, 8),
    ("F32", {"storage_dtype": "float16"}, 16)],
)  # fmt: skip
def test_bits_of_a_stored_value(dtype: str, given: dict[str, Any], bits: int) -> None:
    assert value_bits(dtype, settings(**given)) == bits
