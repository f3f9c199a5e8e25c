"""Stored tensors of a layer, in the compressed and in the dense form."""

import pytest
import torch

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.checkpoints.tensor_io import to_tensor
from pipeline.compression.layer_output import LayerParts
from swsc_core import Encoded, encode
from swsc_core.method.spec import RtnSpec

WEIGHT = torch.arange(24.0).reshape(4, 6)


def encoded() -> Encoded:
    return encode(WEIGHT, [RtnSpec(8)], name="w.weight")


def test_the_compressed_form_has_one_stored_tensor_for_each_part_of_a_matrix() -> None:
    parts = LayerParts("swsc")
    parts.add(whole_matrix(TensorInfo("w.weight", "F32", (4, 6), "f", 0, 96)), encoded())
    assert sorted(part.name for part in parts.parts) == sorted(f"w.{part}" for part in encoded().tensors)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_dense_form_has_the_restored_weight_in_the_layout_of_the_source(transposed: bool) -> None:
    shape = (6, 4) if transposed else (4, 6)
    parts = LayerParts("dense")
    parts.add(whole_matrix(TensorInfo("w.weight", "F32", shape, "f", 0, 96), transposed), encoded())
    (part,) = parts.parts
    assert (part.name, part.shape) == ("w.weight", shape)
    restored = to_tensor(part).T if transposed else to_tensor(part)
    torch.testing.assert_close(restored, WEIGHT, rtol=0.02, atol=0.1)
