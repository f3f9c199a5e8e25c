"""Claims about the fusion of compressed matrices: the result restores to the concatenation of their rows."""

import pytest
import torch

from swsc_core import SwscSpec, encode
from swsc_core.compressed.codec import Encoded
from swsc_core.compressed.registry import can_fuse, fuse, matrix_of


def compressed(rows: int, spec: SwscSpec) -> Encoded:
    weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
    return encode(weight, [spec], name=str(rows))


def test_the_fused_matrix_restores_to_the_concatenation() -> None:
    results = [
        compressed(8, SwscSpec(3, 1)),
        compressed(12, SwscSpec(5, 2, scaled=True)),
        compressed(4, SwscSpec(1, 0)),
    ]
    assert can_fuse([result.entry for result in results])
    fused = fuse([matrix_of(result.tensors, result.entry) for result in results])
    fused.require_valid()
    assert fused.entry.shape == (24, 16)
    torch.testing.assert_close(fused.restore(), torch.cat([result.restored for result in results]))


@pytest.mark.parametrize(
    "spec",
    [SwscSpec(3, 0, "input"), SwscSpec(3, 0, segment_size=4), SwscSpec(3, 0, centroid_bits=8), SwscSpec(0, 2)],
    ids=["columns", "segments", "codes", "no clusters"],
)
def test_other_forms_are_not_fused(spec: SwscSpec) -> None:
    assert not can_fuse([compressed(8, SwscSpec(3, 0)).entry, compressed(12, spec).entry])


def test_ranks_that_exceed_the_smaller_side_are_not_fused() -> None:
    entries = [compressed(8, SwscSpec(3, 8)).entry, compressed(12, SwscSpec(3, 9)).entry]
    assert not can_fuse(entries)
