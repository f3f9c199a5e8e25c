"""Stored values as parameters: gradients against autograd, steps against torch's Adam, rounding against storage."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swsc_core import Metric, SwscMatrix, SwscSpec, compress, restore
from swsc_core.finetune import AdamState, Tunable, adam_step, step_unit, tunable_values

SPECS = {
    "paper": SwscSpec(5, 3),
    "input axis": SwscSpec(4, 2, channel_axis="input", segment_size=4),
    "scaled segments": SwscSpec(8, 0, segment_size=4, scaled=True, metric="activations", feedback=True),
    "codebooks": SwscSpec(4, 2, segment_size=2, codebooks=2, scaled=True),
    "factors alone": SwscSpec(0, 4),
}


def made(spec: SwscSpec, shape: tuple[int, int] = (12, 16)) -> SwscMatrix:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    metric = Metric(torch.eye(shape[1])) if spec.metric == "activations" else None
    return compress(weight, spec, metric=metric)[0]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_gradients_are_those_of_autograd(spec: SwscSpec) -> None:
    matrix = made(spec)
    tunable, values = Tunable(matrix), {name: v.requires_grad_() for name, v in tunable_values(matrix).items()}
    direction = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    (tunable.restored(values) * direction).sum().backward()
    found = tunable.gradients({name: value.detach() for name, value in values.items()}, direction)
    assert found.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value.grad)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("bits", [None, 8])
def test_its_own_values_give_the_matrix_back(spec: SwscSpec, bits: int | None) -> None:
    matrix = made(replace(spec, centroid_bits=bits, factor_bits=bits))
    tunable, values = Tunable(matrix), tunable_values(matrix)
    torch.testing.assert_close(tunable.restored(values), restore(matrix, torch.float32))
    again = tunable.rounded(values)
    for name, value in values.items():
        grid = float(value.abs().max()) / 127 if bits and name != "scales" else 0.0
        torch.testing.assert_close(again[name], value, rtol=0, atol=grid / 2 * 1.01)


def test_what_is_stored_is_what_was_rounded() -> None:
    matrix = made(replace(SPECS["codebooks"], centroid_bits=4, factor_bits=4))
    tunable = Tunable(matrix)
    moved = {name: value * 1.03 + 0.001 for name, value in tunable_values(matrix).items()}
    stored = restore(tunable.stored(moved), torch.float32)
    torch.testing.assert_close(tunable.restored(tunable.rounded(moved)), stored)
    assert tunable.stored(moved).labels is matrix.labels


def test_steps_are_those_of_adam() -> None:
    """In units: the value divided by its unit moves as torch's Adam moves it."""
    draw = torch.Generator().manual_seed(0)
    value, unit = torch.randn(7, generator=draw), torch.full((7,), 0.3)
    reference = (value / unit).requires_grad_()
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-12)
    mean = square = torch.zeros(7)
    for step in range(1, 6):
        gradient: Tensor = torch.randn(7, generator=draw)
        reference.grad = gradient * unit
        adam.step()
        value, mean, square = adam_step(AdamState(value, mean, square), gradient, unit, step, 0.01)
    torch.testing.assert_close(value / unit, reference.detach())


def test_units_are_sizes() -> None:
    assert step_unit("scales", torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]
    assert step_unit("left", torch.tensor([3.0, 4.0])).tolist() == pytest.approx([12.5**0.5] * 2)
    assert bool((step_unit("left", torch.zeros(2, 2)) > 0).all())
