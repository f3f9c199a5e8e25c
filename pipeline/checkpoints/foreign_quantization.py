"""Checkpoints that another method has quantized, and that are refused: by the name of the method, with what helps.

The name comes from config.json, or from what the methods call their tensors: a config is easily left behind.
"""

import re
from collections.abc import Mapping

from pipeline.architectures.model_config import ModelConfig, text_part
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.errors import CheckpointError

# What a stored tensor of a method is called, and what another is called that must be there, too; the first that fits counts.
_MARKS: dict[str, str | tuple[str, str]] = {
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
_NARROW = ("I8", "U8", "F4", "F6_E2M3", "F6_E3M2")  # what packed weights are stored as
_BESIDE = ("_scale", "_scales", "_scale_inv", "_qscale")
# method -> what its config in transformers is called, which takes `dequantize=True`
_CONFIGS = {
    "compressed-tensors": "CompressedTensorsConfig", "mxfp4": "Mxfp4Config", "mxfp8": "FineGrainedFP8Config",
    "fp8": "FineGrainedFP8Config",
}  # fmt: skip
_DEQUANTIZED = ("bitsandbytes", "higgs")  # methods whose loaded model transformers can dequantize


def require_unquantized(where: str, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    """Raise CheckpointError for a checkpoint that is quantized in a way that is not read here."""
    about = _said(config)
    method, found = about.get("quant_method"), ""
    if about and not method and about.get("load_in_4bit", about.get("load_in_8bit")) is not None:
        method = "bitsandbytes"  # of old
    if not method:
        method, found = _by_names(tensors)
    if not about and not found:
        return
    if method == "swsc":
        raise CheckpointError(f"{where}: already quantized by 'swsc'; restore it first (swsc restore)")
    form = f"in the form {about['format']!r}" if isinstance(about.get("format"), str) else ""
    raise CheckpointError(f"{where}: {refusal_message(method, form or (found and f'as {found} shows'))}")


def refusal_message(method: object, why: str = "") -> str:
    """What is said of a model that `method` has quantized."""
    name = repr(method) if method else "a method that config.json does not name"
    return f"already quantized by {name}{f' {why}' if why else ''}; give the unquantized model{_else(method)}"


def _else(method: object) -> str:
    """What else helps, where transformers can dequantize what a method has made."""
    saved = "m.save_pretrained(new_dir)`, where that method is installed"
    if method in _CONFIGS:
        how = f"quantization_config={_CONFIGS[str(method)]}(dequantize=True)"
        return f", or make one: `m = AutoModelForCausalLM.from_pretrained(dir, {how}); {saved}"
    if method in _DEQUANTIZED:
        return f", or make one: `m = AutoModelForCausalLM.from_pretrained(dir); m.dequantize(); {saved}"
    return ": transformers cannot dequantize this one"


def _said(config: ModelConfig) -> ModelConfig:
    """What a config says of a quantization, in the places where it may say so."""
    inner = text_part(config).get("quantization_config")
    found = config.get("quantization_config") or config.get("compression_config") or inner
    return found if isinstance(found, dict) else {}


def _by_names(tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """A method, and the tensor that shows it; ("", "") if none does, ("", name) if it could be several."""
    for method, mark in _MARKS.items():
        pattern, beside = mark if isinstance(mark, tuple) else (mark, "")
        names = (name for name in tensors if re.search(pattern, name))
        if name := next((name for name in names if not beside or re.sub(pattern, beside, name) in tensors), ""):
            return method, name
    packed = (name for name, info in tensors.items() if info.dtype in _NARROW and len(info.shape) >= 2)
    return "", next((name for name in packed if any(f"{name}{ending}" in tensors for ending in _BESIDE)), "")
