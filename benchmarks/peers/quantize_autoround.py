"""AutoRound: rounding and ranges learned by signed gradient descent, block by block.

Codes are symmetric, the default of the tool's W2A16 and W3A16. At 2 bits the script sets `enable_alg_ext`, as its
documentation recommends; `--extension` sets it at other widths. 200 iterations are the default, 1000 the best recipe of
the tool. It uses bfloat16 autocast, the default, where the processor has AMX, and float32 elsewhere, because most CPUs
emulate bfloat16. Bits count codes at their width and one scale of 16 bits per group; the zero point is constant and not
counted. The last group of a row may be shorter.
"""

import argparse
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.script import CHANNEL, SCALE_BYTES, Outcome, Shapes, arguments, run
from swsc_core.storage.packing import packed_bytes


def quantize(request: argparse.Namespace, shapes: Shapes) -> Outcome:
    windows, extension = np.load(request.calibration), request.extension or request.bits == 2
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    unselected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in shapes
    ]
    amp = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request.model),
        scheme=f"W{request.bits}A16",
        group_size=request.group_size,
        iters=request.iters,
        enable_alg_ext=extension,
        dataset=[torch.from_numpy(ids)[None] for ids in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        layer_config={name: {"bits": 16} for name in unselected},
        device_map="cpu",
        amp=amp,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        seed=42,
    )
    model, _ = rounding.quantize()
    weights, stored = {}, {}
    for name in shapes:
        weights[name], stored[name] = restored(model.get_submodule(name.removesuffix(".weight")), request.bits)
    group = "channel" if request.group_size == CHANNEL else request.group_size
    settings = {
        "bits": request.bits,
        "group": group,
        "symmetric": True,
        "iters": request.iters,
        "enable_alg_ext": extension,
        "amp": amp,
        "calibration": list(windows.shape),
    }
    return Outcome("AutoRound", version("auto-round"), settings, weights, stored)


def restored(layer: Any, bits: int) -> tuple[Tensor, int]:
    """The restored matrix and its stored bytes."""
    assert (layer.sym, layer.bits) == (True, bits), "counted without zero points"
    assert torch.equal(layer.scale.float(), layer.scale.half().float()), "counted as 16 bits"
    return layer.weight.data, packed_bytes(layer.weight.numel(), bits) + layer.scale.numel() * SCALE_BYTES


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--extension", action="store_true", help="enable_alg_ext at any width")
    raise SystemExit(run(parser, quantize))
