"""Compression of a dense model after it was loaded, without calibration: `quantization_config=SwscConfig(bits=3)`."""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from swsc_core.allocation.budget import solve_budget
from swsc_core.allocation.candidate_specs import largest_within, uncompensated
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.dense_layers import DenseLayers
from swsc_core.hf.layer_replacement import put_layer
from swsc_core.layers.linear import SwscLinear
from swsc_core.method.spec import SwscSpec
from swsc_core.storage.bits import Geometry


def compress_loaded(model: Any, config: SwscConfig) -> None:
    """Replace the linear layers of `model` that `config.include` selects by compressed ones.

    Raises:
        ValueError: no layer is selected; a selected layer is tied to another one, offloaded, or has to stay dense; or
            the bits are too few for a matrix. The model is not changed in the first three cases.
    """
    paths = [p for p, module in model.named_modules() if type(module) is nn.Linear and re.search(config.include, p)]
    if not paths:
        raise ValueError(f"SwscConfig: include {config.include!r} matches no linear layer of {type(model).__name__}")
    dense = DenseLayers(model)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for path in paths:
        _require_compressible(path, model.get_submodule(path), tied)
        if reason := dense.reason(path, floats=True):
            raise ValueError(f"SwscConfig: {path} has to stay dense ({reason}); leave it out of include")
    for path in paths:
        linear = model.get_submodule(path)
        put_layer(model, path, SwscLinear.from_linear(linear, _spec(linear, config), seed=config.seed))


def _require_compressible(path: str, linear: nn.Linear, tied: set[str]) -> None:
    if f"{path}.weight" in tied:
        raise ValueError(
            f"SwscConfig: {path} is tied to another layer; leave it out of include, or use `swsc compress`"
        )
    if linear.weight.device.type == "meta":
        raise ValueError(
            f"SwscConfig: {path} is offloaded to disk; keep it in memory, or use `swsc compress` and open its output"
        )


def _spec(linear: nn.Linear, config: SwscConfig) -> SwscSpec:
    """The largest spec of the requested form within `config.bits`."""
    m, n = linear.weight.shape
    width = 8 * linear.weight.element_size()
    if config.form == "paper":
        return SwscSpec(*solve_budget(Geometry(m, n, "output"), config.bits, value_bits=width))
    candidates = (replace(spec, metric="weights", feedback=False, rounds=0) for spec in uncompensated((m, n), width))
    spec = largest_within(candidates, (m, n), width, config.bits)
    if spec is None:
        raise ValueError(f"SwscConfig: bits {config.bits:g} are too few for a matrix of {m}×{n}; raise bits")
    return spec
