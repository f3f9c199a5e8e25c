"""Checkpoints of other methods are refused by the name of the method."""

from typing import Any

import pytest

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.errors import CheckpointError


def tensors(*names: str, dtype: str = "I32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, (4, 4), "f", 8, 0) for name in names}


@pytest.mark.parametrize(
    ("config", "names", "facts"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, (), ("'gptq'",)),
        ({"quantization_config": {"quant_method": "swsc"}}, (), ("swsc restore",)),
        ({"quantization_config": {"load_in_8bit": True}}, (), ("'bitsandbytes'", "dequantize")),
        ({"compression_config": {"quant_method": "compressed-tensors", "format": "int"}}, (), ("'int'",)),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, (), ("'hqq'",)),
        ({}, ("a.qweight",), ("'awq'", "a.qweight")),
        ({}, ("a_blocks", "a_scales"), ("'mxfp4'", "a_blocks")),
    ],
)
def test_the_message_names_the_method(config: dict[str, Any], names: tuple[str, ...], facts: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_unquantized("m", tensors(*names), config)
    assert all(fact in str(caught.value) for fact in ("m: ", *facts))


def test_packed_weights_of_an_unknown_method_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not name.*a\.weight"):
        require_unquantized("m", tensors("a.weight", "a.weight_scale", dtype="U8"), {})


def test_dense_weights_are_accepted() -> None:
    require_unquantized("m", tensors("a.weight", "a_blocks", dtype="BF16"), {})
