"""GPTQ and AWQ of llm-compressor, block by block; later blocks are calibrated on the quantized earlier ones.

Both are asymmetric, with ranges of the `imatrix_mse` observer: the best one of the tool's documentation for GPTQ, and
the best of three that were tried for AWQ, which does not clip here. GPTQ uses activation order (static: no index is
stored) and the default dampening. AWQ searches 20 scales with duo scaling "both", as in the tool's example.

AWQ moves scales of columns into the preceding layers, which this benchmark must not change. The restored matrix is
divided by the scales again, which gives the same function of the input, and all other tensors stay unchanged. Bits
count what the packed format of the tool stores: codes and zero points without gaps, and scales of 16 bits. The dtype is
bfloat16, that of most checkpoints, where the processor has AMX, and float32 elsewhere.
"""

import argparse
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.peers.script import CHANNEL, SCALE_BYTES, Outcome, Refusal, Shapes, arguments, run

if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *_: None  # version 0.14 pins memory even without an accelerator
ALL_ATTENTION_FUNCTIONS.register(
    "eager", sdpa_attention_forward
)  # version 0.14 selects "eager": equal results, but slower
METHODS: dict[str, dict[str, str | int]] = {
    "gptq": {"actorder": "static"},
    "awq": {"duo_scaling": "both", "n_grid": 20},
}


# module -> factors that remove the scales of AWQ from its matrix
UNDO: dict[torch.nn.Module, Tensor] = {}


class RecordingAWQ(AWQModifier):
    """AWQ that records the scales by which it multiplied the columns of a module, or divided its rows."""

    def _compute_best_scale(self, mapping: Any, *arguments: Any) -> Tensor:
        scales = super()._compute_best_scale(mapping, *arguments)
        for module in mapping.balance_layers:
            UNDO[module] = UNDO.get(module, 1) / scales
        UNDO[mapping.smooth_layer] = UNDO.get(mapping.smooth_layer, 1) * scales[:, None]
        return scales


def quantize(request: argparse.Namespace, shapes: Shapes) -> Outcome:
    group = request.group_size
    odd = [columns for _, columns in shapes.values() if group != CHANNEL and columns % group]
    if odd:
        raise Refusal(f"llm-compressor needs groups that divide a row: {odd[0]} columns are not a multiple of {group}")
    dtype = torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype)
    scheme = {
        "num_bits": request.bits,
        "symmetric": False,
        "observer": request.observer,
        "strategy": "channel" if group == CHANNEL else "group",
        "group_size": None if group == CHANNEL else group,
        "scale_dtype": torch.float16,
    }
    windows = np.load(request.calibration)
    recipe = recipe_of(request.method, {"group_0": {"targets": list(map(module_name, shapes)), "weights": scheme}})
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=batches(windows),
        recipe=recipe,
        pipeline="sequential",
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
    )
    weights, stored = {}, {}
    for name in shapes:
        weights[name], stored[name] = restored(model.get_submodule(module_name(name)))
    settings = {
        "bits": request.bits,
        "group": "channel" if group == CHANNEL else group,
        "symmetric": False,
        "observer": scheme["observer"],
        "dtype": str(dtype),
        "calibration": list(windows.shape),
    }
    tool = f"llmcompressor {version('llmcompressor')}"
    return Outcome(request.method.upper(), tool, settings | METHODS[request.method], weights, stored)


def recipe_of(method: str, groups: dict[str, object]) -> list[Any]:
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, **METHODS[method])]
    return [RecordingAWQ(**METHODS[method]), QuantizationModifier(config_groups=groups)]


def module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def batches(windows: np.ndarray) -> DataLoader:
    rows: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.from_numpy(windows)]
    return DataLoader(rows, batch_size=1)


def restored(module: Any) -> tuple[Tensor, int]:
    """The matrix of a module, unpacked from its packed form and without AWQ's scales, and its stored bytes."""
    state = {part: getattr(module, part).data for part in ("weight", "weight_scale", "weight_zero_point")}
    packed = Packed.compress(state, module.quantization_scheme)
    assert torch.equal(packed["weight_scale"], packed["weight_scale"].half().float()), "counted as 16 bits"
    integers = sum(packed[part].numel() * 4 for part in ("weight_packed", "weight_zero_point"))
    weight = Packed.decompress(packed, module.quantization_scheme)["weight"].float()
    return weight * UNDO.get(module, 1), integers + packed["weight_scale"].numel() * SCALE_BYTES


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--observer", default="imatrix_mse", help="observer that determines ranges")
    raise SystemExit(run(parser, quantize))
