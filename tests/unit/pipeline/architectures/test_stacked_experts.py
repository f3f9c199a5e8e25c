"""Stacked experts are split only where the shape of the tensor matches the config."""

import pytest

from pipeline.architectures.stacked_experts import is_stack, stacks
from pipeline.architectures.tensor_info import TensorInfo

CONFIG = {"num_experts": 4, "intermediate_size": 6, "hidden_size": 10}


@pytest.mark.parametrize(
    ("transposed", "shape", "expected"),
    [
        (False, (4, 12, 10), False), (True, (4, 10, 12), True), (None, (4, 12, 10), False), (None, (4, 10, 12), True),
    ],
)  # fmt: skip
def test_gate_and_up_are_fused_in_one_stack(transposed: bool | None, shape: tuple[int, ...], expected: bool) -> None:
    gate_up, down = stacks("gate_up", "down", transposed)
    assert gate_up.is_transposed(shape, CONFIG) == expected
    down_shape = (4, 6, 10) if expected else (4, 10, 6)
    assert down.is_transposed(down_shape, CONFIG) == expected


@pytest.mark.parametrize(("shape", "config"), [((4, 10, 12), CONFIG), ((3, 12, 10), CONFIG), ((4, 12, 10), {})])
def test_another_shape_is_refused(shape: tuple[int, ...], config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        stacks("gate_up", "down")[0].is_transposed(shape, config)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "expected"),
    [
        ("experts.down_proj", "BF16", (4, 6, 10), True),
        ("experts.down_proj", "I32", (4, 6, 10), False),
        ("experts.down_proj.bias", "BF16", (4, 6, 10), False),
        ("conv1d.weight", "BF16", (4, 6, 10), False),
        ("experts.down_proj", "BF16", (4, 1, 10), False),
        ("experts.down_proj", "BF16", (6, 10), False),
    ],
)
def test_a_stack_holds_matrices(name: str, dtype: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_stack(TensorInfo(name, dtype, shape, "f", 0, 0)) == expected
