"""MatrixLocation: round trip through JSON, and shapes and rows of each kind of location."""

from typing import Any

import pytest
import torch

from swsc_core.storage.location import KEYS, MatrixLocation, row_blocks_of
from swsc_core.storage.row_blocks import RowBlocks, apply_view

FUSED = {"tensor": "h.0.attn.c_attn.weight", "rows": [8, 4, 12, 2]}


@pytest.mark.parametrize(
    "about",
    [{}, {"transposed": True}, FUSED, {"transposed": True, **FUSED}, {**FUSED, "stacked": 3}],
    ids=str,
)
def test_json_is_what_it_was_key_by_key_in_order(about: dict[str, Any]) -> None:
    other = {"method": "rtn", "shape": [8, 5]}
    location = MatrixLocation.from_json({**other, **about})
    assert list(location.to_json().items()) == list(about.items())
    assert MatrixLocation.from_json(location.to_json()) == location


@pytest.mark.parametrize(
    ("about", "key"),
    [
        ({"transposed": 1}, "transposed"),
        ({**FUSED, "tensor": ""}, "tensor"),
        ({**FUSED, "rows": [0, 4, 4, True]}, "rows"),
        ({**FUSED, "rows": [0, 4, 4, -1]}, "rows"),
        ({**FUSED, "stacked": 0}, "stacked"),
        ({**FUSED, "stacked": None}, "stacked"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(about: dict[str, Any], key: str) -> None:
    assert key in KEYS
    with pytest.raises(ValueError, match=f"^{key} is "):
        MatrixLocation.from_json(about)


def test_keys_that_do_not_go_together_are_refused_however_a_location_is_made() -> None:
    rows = RowBlocks(0, 4, 4, 1)
    for wrong in ({"tensor": "a"}, {"row_blocks": rows}, {"n_experts": 2}):
        with pytest.raises(ValueError, match="rows"):
            MatrixLocation(**wrong)


def test_rows_of_a_stack_are_counted_through_its_matrices() -> None:
    location = MatrixLocation("experts", True, RowBlocks(3 * 10 + 5, 5, 10, 1), 4)
    assert location.expert(10) == 3
    assert location.rows_in_expert(10) == RowBlocks(5, 5, 10, 1)
    assert location.tensor_shape(40, 7) == (4, 7, 10)
    assert MatrixLocation().expert(10) is None
    location.require_rows(5)
    with pytest.raises(ValueError, match="the 6 rows"):
        location.require_rows(6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_view_of_the_checkpoint_layout_is_the_matrix(transposed: bool) -> None:
    fused = torch.randn(6 * 4, 5)
    rows = RowBlocks(1, 2, 3, 2)
    plain = MatrixLocation(transposed=transposed)
    assert plain.to_checkpoint_layout(fused).shape == plain.tensor_shape(24, 5)
    assert torch.equal(apply_view(plain.to_checkpoint_layout(fused), transposed, rows), rows.take(fused))
    stack = MatrixLocation("x", transposed, rows.shifted(2 * 6), 4)
    tensor = stack.to_checkpoint_layout(fused)
    assert tensor.shape == stack.tensor_shape(24, 5)
    assert torch.equal(apply_view(tensor[2], transposed, stack.rows_in_expert(6)), rows.take(fused[12:18]))


def test_an_entry_of_no_part_has_no_rows_in_a_fused_matrix() -> None:
    assert row_blocks_of([MatrixLocation.from_json(FUSED)]) == [RowBlocks(8, 4, 12, 2)]
    with pytest.raises(ValueError, match="rows"):
        row_blocks_of([MatrixLocation.from_json(FUSED), MatrixLocation()])
