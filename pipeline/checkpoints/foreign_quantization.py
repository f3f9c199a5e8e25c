"""Refuses checkpoints that another method has quantized.

The message names the method and a way to dequantize the model. The method is known from config.json, or from the names
of its tensors, because a config is easily lost.
"""

import re
from collections.abc import Mapping

from pipeline.architectures.model_config import ModelConfig, text_part
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.errors import CheckpointError

# Method -> pattern of the name of a tensor that only it stores. With a second name, that tensor must exist beside the
# first one. The first method that matches counts.
_PATTERNS: dict[str, str | tuple[str, str]] = {
    "compressed-tensors": r"\.weight_(packed|global_scale|shape)$",
    "modelopt (NVFP4)": r"\.weight_scale_2$",
    "bitsandbytes": r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$|\.SCB$",
    "gptq": r"\.g_idx$",
    "awq": r"\.qweight$",
    "hqq": r"\.W_q$",
    "mxfp4": (r"_blocks$", "_scales"),
    "aqlm": (r"\.codebooks$", ".codes"),
    "quanto": r"\.weight\._data$",
    "eetq": r"\.weight_scales$",
}
# Dtypes of packed weights, and endings of the names of their scales.
_PACKED_DTYPES = ("I8", "U8", "F4", "F6_E2M3", "F6_E3M2")
_SCALES = ("_scale", "_scales", "_scale_inv", "_qscale")
# Method -> class of its config in transformers, which accepts `dequantize=True`.
_CONFIGS = {
    "compressed-tensors": "CompressedTensorsConfig",
    "mxfp4": "Mxfp4Config",
    "mxfp8": "FineGrainedFP8Config",
    "fp8": "FineGrainedFP8Config",
}
# Methods whose models transformers can dequantize after loading.
_DEQUANTIZABLE = ("bitsandbytes", "higgs")


def require_unquantized(location: str, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    """Raise CheckpointError for a checkpoint in a quantized format that cannot be read.

    Args:
        location: location of the checkpoint, for messages.
    """
    quantization = _quantization(config)
    method, evidence = quantization.get("quant_method"), ""
    old_flag = quantization.get("load_in_4bit", quantization.get("load_in_8bit"))
    if quantization and not method and old_flag is not None:
        method = "bitsandbytes"  # older configs do not name it
    if not method:
        method, evidence = _method_by_names(tensors)
    if not quantization and not evidence:
        return
    if method == "swsc":
        raise CheckpointError(f"{location}: already quantized by 'swsc'; restore it first (swsc restore)")
    if isinstance(quantization.get("format"), str):
        reason = f"in the format {quantization['format']!r}"
    else:
        reason = f"as {evidence} shows" if evidence else ""
    raise CheckpointError(f"{location}: {refusal_message(method, reason)}")


def refusal_message(method: object, reason: str = "") -> str:
    """Return the message about a model that `method` has quantized, with a remedy."""
    name = repr(method) if method else "a method that config.json does not name"
    return f"already quantized by {name}{f' {reason}' if reason else ''}; give the unquantized model{_remedy(method)}"


def _remedy(method: object) -> str:
    """Return how transformers can dequantize a model of the method, or that it cannot."""
    save = "m.save_pretrained(new_dir)`, where that method is installed"
    if method in _CONFIGS:
        option = f"quantization_config={_CONFIGS[str(method)]}(dequantize=True)"
        return f", or dequantize it: `m = AutoModelForCausalLM.from_pretrained(dir, {option}); {save}"
    if method in _DEQUANTIZABLE:
        return f", or dequantize it: `m = AutoModelForCausalLM.from_pretrained(dir); m.dequantize(); {save}"
    return ": transformers cannot dequantize this one"


def _quantization(config: ModelConfig) -> ModelConfig:
    """Return the description of a quantization, from any of its places in a config; empty if there is none."""
    in_text = text_part(config).get("quantization_config")
    quantization = config.get("quantization_config") or config.get("compression_config") or in_text
    return quantization if isinstance(quantization, dict) else {}


def _method_by_names(tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """Return a method and the tensor that shows it; ("", name) if several methods are possible, ("", "") if none is."""
    for method, mark in _PATTERNS.items():
        pattern, companion = mark if isinstance(mark, tuple) else (mark, "")
        names = (name for name in tensors if re.search(pattern, name))
        for name in names:
            if not companion or re.sub(pattern, companion, name) in tensors:
                return method, name
    packed = (name for name, info in tensors.items() if info.dtype in _PACKED_DTYPES and len(info.shape) >= 2)
    return "", next((name for name in packed if any(f"{name}{ending}" in tensors for ending in _SCALES)), "")
