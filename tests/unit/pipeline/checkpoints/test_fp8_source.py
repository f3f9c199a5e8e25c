"""fp8 weights and their scales are converted to bfloat16 tensors; blocks follow from the shapes."""

import pytest

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.fp8_source import read_as_bfloat16
from pipeline.errors import CheckpointError


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "model.safetensors", 8, 0)


def checkpoint(*scales: int, ending: str = "_scale_inv", dtype: str = "F32") -> dict[str, TensorInfo]:
    infos = [
        info("a.weight", "F8_E4M3", 6, 10), info(f"a.weight{ending}", dtype, *scales), info("a.input_scale", "F32"),
        info("norm.weight", "BF16", 10),
    ]  # fmt: skip
    return {one.name: one for one in infos}


@pytest.mark.parametrize(
    ("scales", "size", "block"),
    [
        ((), None, (6, 10)),
        ((1,), None, (6, 10)),
        ((6,), None, (1, 10)),
        ((6, 1), None, (1, 10)),
        ((2, 3), [4, 4], (4, 4)),
    ],
)
def test_the_block_of_a_scale(scales: tuple[int, ...], size: list[int] | None, block: tuple[int, int]) -> None:
    config = {"hidden_size": 10, "quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    tensors, dense, consumed = read_as_bfloat16("m", checkpoint(*scales), config)
    assert tensors.keys() == {"a.weight", "norm.weight"}
    weight = tensors["a.weight"]
    assert (weight.dtype, weight.nbytes) == ("BF16", 120)
    assert weight.fp8 is not None
    assert weight.fp8.block == block
    assert dense == {"hidden_size": 10}
    assert {one.name for one in consumed} == {"a.weight_scale_inv", "a.input_scale"}


def test_other_checkpoints_are_unchanged() -> None:
    tensors = {"norm.weight": info("norm.weight", "BF16", 10)}
    config = {"quantization_config": {"quant_method": "gptq"}}
    assert read_as_bfloat16("m", tensors, config) == (tensors, config, ())


@pytest.mark.parametrize(
    ("scales", "dtype", "word"), [((5,), "F32", "a.weight_scale_inv"), ((6,), "I32", "I32"), ((6,), "U8", "mxfp8")]
)
def test_scales_that_do_not_match_are_refused(scales: tuple[int, ...], dtype: str, word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        read_as_bfloat16("m", checkpoint(*scales, dtype=dtype), {})


def test_a_weight_without_scales_is_named() -> None:
    tensors = checkpoint(6) | {"b.weight": info("b.weight", "F8_E4M3", 2, 2)}
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        read_as_bfloat16("m", tensors, {})
