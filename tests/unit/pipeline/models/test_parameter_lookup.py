"""The parameter of a checkpoint's tensor is found by name, by values, or as rows of a stacked parameter."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.models.parameter_lookup import ParameterView, find_parameter
from swsc_core.storage.row_blocks import RowBlocks

STACK = torch.randn(3, 8, 5)


class Model(nn.Module):
    """A layer of its own, one of the same shape, and the up projections of three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].register_parameter("up", nn.Parameter(STACK.clone()))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({}, STACK),
        ({"expert": 1, "rows": slice(2, 6)}, STACK[1, 2:6]),
        ({"expert": 1, "rows": slice(None), "transposed": True}, STACK[1].T),
        ({"expert": 2, "rows": slice(None), "row_blocks": RowBlocks(1, 1, 3, 2)}, STACK[2][[1, 4]]),
        ({"expert": 0, "rows": slice(None), "transposed": True, "row_blocks": RowBlocks(0, 2, 4, 1)}, STACK[0].T[:2]),
    ],
)
def test_what_is_put_into_a_part_is_found_there_and_nothing_else_changes(
    view: dict[str, object], expected: Tensor
) -> None:
    parameter = nn.Parameter(STACK.clone())
    part = ParameterView(parameter, **view)  # type: ignore[arg-type]
    assert torch.equal(part.of(parameter), expected)
    part.put(expected + 1)
    assert torch.equal(part.of(parameter), expected + 1)
    assert int((parameter != STACK).sum()) == expected.numel()


def test_a_parameter_is_found_by_name_then_by_its_values() -> None:
    model = Model()
    assert find_parameter(model, "a.weight", model.b.weight, "m").parameter is model.a.weight
    assert find_parameter(model, "renamed.weight", model.b.weight, "m").parameter is model.b.weight


def test_an_expert_is_some_rows_of_a_parameter_of_its_layer() -> None:
    model = Model()
    found = find_parameter(model, "layers.0.experts.1.up.weight", STACK[1, 2:7], "m")
    assert (found.expert, found.rows) == (1, slice(2, 7))
    with pytest.raises(CheckpointError, match=r"m: .*layers\.1\.experts\.1\.up\.weight"):
        find_parameter(model, "layers.1.experts.1.up.weight", STACK[1, 2:7], "m")
