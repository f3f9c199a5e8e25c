"""Row layouts cover every row of the fused matrix, in the order of the family."""

import pytest

from pipeline.architectures.fused_layouts import (
    FusedLayout,
    by_group,
    by_head,
    concatenated,
    falcon,
    halves,
    interleaved,
    latent,
)

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
MLA = {"num_attention_heads": 8, "qk_nope_head_dim": 5, "v_head_dim": 3}


@pytest.mark.parametrize(
    ("layout", "config", "rows", "expected"),
    [
        (concatenated, CONFIG, 96, (1, (64, 16, 16))),
        (concatenated, {**CONFIG, "head_dim": 4}, 48, (1, (32, 8, 8))),
        (by_head, CONFIG, 192, (8, (8, 8, 8))),
        (by_group, CONFIG, 96, (2, (32, 8, 8))),
        (falcon, {**CONFIG, "new_decoder_architecture": True}, 96, (2, (32, 8, 8))),
        (falcon, CONFIG, 80, (1, (64, 8, 8))),
        (falcon, {**CONFIG, "multi_query": False}, 192, (8, (8, 8, 8))),
        (halves, {}, 10, (1, (5, 5))),
        (interleaved, {}, 10, (5, (1, 1))),
        (latent, MLA, 64, (8, (5, 3))),
    ],
)
def test_groups_cover_all_rows(
    layout: FusedLayout, config: dict[str, int], rows: int, expected: tuple[int, tuple[int, ...]]
) -> None:
    groups, pieces = layout(config, rows)
    assert (groups, pieces) == expected
    assert groups * sum(pieces) == rows


def test_a_config_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads"):
        concatenated({"hidden_size": 64}, 96)
