"""Checkpoints that are quantized already: those in fp8 are read as bfloat16, all others are refused.

An fp8 weight has scales beside it: one for the tensor, one a row, or one a block (DeepSeek-V3, Qwen3-FP8). The weight is what
both together say, so they are read together wherever it is read, and neither scales nor `quantization_config` are passed on.
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
_SCALES = (
    "_scale_inv",
    "_scale",
)  # what names of weights end on to be those of their scales; both are to be multiplied with
_IDLE = ("input_scale", "activation_scale")  # of the arithmetic that fp8 is meant for
_READ = (
    None,
    "fp8",
    "compressed-tensors",
    "fbgemm_fp8",
)  # methods whose fp8 weights are read; None: config.json is silent
SCALE_REASON = "a scale of fp8 weights, which are read as bfloat16"


def read_as_bfloat16(
    where: str, tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> tuple[dict[str, TensorInfo], ModelConfig, tuple[TensorInfo, ...]]:
    """Tensors, config and consumed scales of a checkpoint that may be in fp8; as they are, if it is not.

    Raises:
        CheckpointError: fp8 weights without scales, or scales that do not fit them.
    """
    about: ModelConfig = config.get("quantization_config") or {}
    pairs = {} if about.get("quant_method") not in _READ else _pairs(tensors)
    if not pairs:
        return dict(tensors), config, ()
    if bare := [name for name, info in tensors.items() if info.dtype in _FP8 and name not in pairs]:
        raise CheckpointError(f"{where}: {bare[0]} is fp8 and has no scales, others have; download it again")
    scales = {scale.name: scale for scale in pairs.values()}
    idle = {name: info for name, info in tensors.items() if name.endswith(_IDLE) and f"{_stem(name)}.weight" in pairs}
    left = {
        name: _dequantized(where, info, pairs[name], about) if name in pairs else info
        for name, info in tensors.items()
        if name not in scales and name not in idle
    }
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    return left, own, (*scales.values(), *idle.values())


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """fp8 weight -> its scales."""
    return {
        name: tensors[name + ending]
        for name, info in tensors.items()
        for ending in _SCALES
        if info.dtype in _FP8 and name + ending in tensors
    }


def _dequantized(where: str, info: TensorInfo, scales: TensorInfo, about: ModelConfig) -> TensorInfo:
    block = _block(info.shape, scales.shape, about)
    if scales.dtype in ("F8_E8M0", "U8"):  # powers of two, one for 32 values
        raise CheckpointError(f"{where}: {refusal_message('mxfp8', f'the scales of {info.name} are {scales.dtype}')}")
    if block is None or scales.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(
            f"{where}: {scales.name} ({scales.dtype} {list(scales.shape)}) does not say how {info.name}"
            f" {list(info.shape)} is scaled, with weight_block_size {about.get('weight_block_size')}; give the model in bfloat16"
        )
    return replace(info, dtype="BF16", nbytes=info.count * DTYPES["BF16"][1], fp8=Fp8Weight(info, scales, block))


def _block(shape: tuple[int, ...], scales: tuple[int, ...], about: ModelConfig) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the scales do not fit."""
    if len(shape) != 2:
        return None
    m, n = shape
    if scales in ((), (1,), (1, 1)):
        return m, n
    if scales in ((m,), (m, 1)):
        return 1, n
    size = about.get("weight_block_size") or _group_block(about)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        return None
    return (size[0], size[1]) if scales == (-(-m // size[0]), -(-n // size[1])) else None


def _group_block(about: ModelConfig) -> Any:
    """The block size of compressed-tensors, if all groups of weights have the same."""
    groups = about.get("config_groups")
    own = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    sizes = [weights.get("block_structure") for weights in own]
    return sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
