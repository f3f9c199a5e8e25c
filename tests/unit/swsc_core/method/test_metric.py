"""Claims about the metric: the weighted error is the quadratic form of its definition, and whitening makes it plain."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swsc_core import Metric
from swsc_core.checks import InvalidWeightError


def matrices(seed: int, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """An error, a Hessian and row weights."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * n, n, generator=generator) * torch.logspace(-1, 1, n)
    return torch.randn(m, n, generator=generator), inputs.T @ inputs, torch.rand(m, generator=generator) + 0.1


@given(seed=st.integers(0, 100), has_hessian=st.booleans(), has_weights=st.booleans())
def test_the_weighted_error_is_the_trace_of_its_definition(seed: int, has_hessian: bool, has_weights: bool) -> None:
    error, hessian, weights = matrices(seed, 5, 8)
    metric = Metric(hessian if has_hessian else None, weights if has_weights else None)
    h = torch.eye(8) if metric.hessian is None else metric.hessian
    d = torch.ones(5) if metric.row_weights is None else metric.row_weights
    trace = float((d.double().diag() @ error.double() @ h.double() @ error.double().T).trace())
    assert metric.weighted_error(error) == pytest.approx(trace, rel=1e-5)
    assert metric.weighted_error(error[2:], first=2) + metric.weighted_error(error[:2]) == pytest.approx(
        trace, rel=1e-5
    )
    assert float(metric.whiten_(error.clone()).square().sum()) == pytest.approx(trace, rel=1e-4)


def test_unwhitening_undoes_whitening() -> None:
    error, hessian, weights = matrices(1, 5, 8)
    metric = Metric(hessian, weights)
    whitened = metric.whiten_(error.clone())
    torch.testing.assert_close(metric.unwhiten_left(metric.unwhiten_right(whitened)), error, rtol=1e-3, atol=1e-3)


def test_the_metric_of_some_rows_weights_these_rows() -> None:
    error, hessian, weights = matrices(2, 5, 8)
    metric, rows = Metric(hessian, weights), torch.tensor([3, 1])
    by_row = [metric.weighted_error(error[row : row + 1], first=row) for row in (3, 1)]
    assert metric.of_rows(rows).weighted_error(error[rows]) == pytest.approx(sum(by_row))


def test_the_plain_metric_has_no_root() -> None:
    with pytest.raises(ValueError, match="q_proj"):
        _ = Metric(name="q_proj").root


@pytest.mark.parametrize(
    "weights", [torch.zeros(3), torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0, torch.nan, 1.0])]
)
def test_row_weights_that_are_no_weights_are_refused(weights: Tensor) -> None:
    with pytest.raises(InvalidWeightError, match="q_proj"):
        Metric(row_weights=weights, name="q_proj")
