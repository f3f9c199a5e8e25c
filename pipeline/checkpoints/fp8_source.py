"""Reads fp8 checkpoints as bfloat16.

Scales are stored beside an fp8 weight: one for the tensor, one per row, or one per block (DeepSeek-V3, Qwen3-FP8).
Weight and scales are read together wherever the weight is read. Neither the scales nor `quantization_config` are
copied to an output.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.architectures.model_config import ModelConfig
from pipeline.architectures.tensor_info import Fp8Weight, TensorInfo
from pipeline.checkpoints.foreign_quantization import refusal_message
from pipeline.errors import CheckpointError
from swsc_core.storage.safetensors_header import DTYPES

_FP8 = ("F8_E4M3", "F8_E5M2")
# Endings that turn the name of a weight into that of its scales. The weight is multiplied with either kind.
_SCALES = ("_scale_inv", "_scale")
# Endings of scales of activations, which only fp8 arithmetic needs.
_ACTIVATION_SCALES = ("input_scale", "activation_scale")
# Values of `quant_method` with fp8 weights that are read; None: config.json has no quantization_config.
_METHODS = (None, "fp8", "compressed-tensors", "fbgemm_fp8")
# Reason for scales in plans and reports.
SCALE_REASON = "a scale of fp8 weights, which are read as bfloat16"


def read_as_bfloat16(
    location: str, tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> tuple[dict[str, TensorInfo], ModelConfig, tuple[TensorInfo, ...]]:
    """Replace fp8 weights and their scales by bfloat16 tensors.

    Args:
        location: location of the checkpoint, for messages.

    Returns:
        The tensors, the config without `quantization_config`, and the scales. A checkpoint without fp8 weights is
        unchanged.

    Raises:
        CheckpointError: an fp8 weight without scales, or scales that do not match it.
    """
    quantization: ModelConfig = config.get("quantization_config") or {}
    pairs = {} if quantization.get("quant_method") not in _METHODS else _scales_of(tensors)
    if not pairs:
        return dict(tensors), config, ()
    if unscaled := [name for name, info in tensors.items() if info.dtype in _FP8 and name not in pairs]:
        raise CheckpointError(f"{location}: {unscaled[0]} is fp8 and has no scales, others have; download it again")
    scales = {info.name: info for info in pairs.values()}
    activation_scales = {
        name: info
        for name, info in tensors.items()
        if name.endswith(_ACTIVATION_SCALES) and f"{_module(name)}.weight" in pairs
    }
    weights = {
        name: _dequantized(location, info, pairs[name], quantization) if name in pairs else info
        for name, info in tensors.items()
        if name not in scales and name not in activation_scales
    }
    dense_config = {key: value for key, value in config.items() if key != "quantization_config"}
    return weights, dense_config, (*scales.values(), *activation_scales.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _scales_of(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return fp8 weight -> its scales."""
    return {
        name: tensors[name + ending]
        for name, info in tensors.items()
        for ending in _SCALES
        if info.dtype in _FP8 and name + ending in tensors
    }


def _dequantized(location: str, info: TensorInfo, scales: TensorInfo, quantization: ModelConfig) -> TensorInfo:
    block = _block(info.shape, scales.shape, quantization)
    if scales.dtype in ("F8_E8M0", "U8"):  # powers of two, one for 32 values
        reason = f"the scales of {info.name} are {scales.dtype}"
        raise CheckpointError(f"{location}: {refusal_message('mxfp8', reason)}")
    if block is None or scales.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(
            f"{location}: the scales {scales.name} ({scales.dtype} {list(scales.shape)}) do not match {info.name}"
            f" {list(info.shape)} with weight_block_size {quantization.get('weight_block_size')}; give the model in"
            " bfloat16"
        )
    return replace(info, dtype="BF16", nbytes=info.count * DTYPES["BF16"][1], fp8=Fp8Weight(info, scales, block))


def _block(shape: tuple[int, ...], scales: tuple[int, ...], quantization: ModelConfig) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if the shape of the scales does not match."""
    if len(shape) != 2:
        return None
    m, n = shape
    if scales in ((), (1,), (1, 1)):
        return m, n
    if scales in ((m,), (m, 1)):
        return 1, n
    size = quantization.get("weight_block_size") or _group_block(quantization)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        return None
    return (size[0], size[1]) if scales == (-(-m // size[0]), -(-n // size[1])) else None


def _group_block(quantization: ModelConfig) -> Any:
    """Return the block size of compressed-tensors if it is the same in all groups of weights."""
    groups = quantization.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    sizes = [group_weights.get("block_structure") for group_weights in weights]
    return sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
