"""Unfusing of a mixture's experts in an empty model, which lets compressed layers hold them, and fusing them again.

transformers 5 fuses the experts of a layer while it loads them. Names do not show which expert classes can be unfused.
A class can if its forward pass is that of `use_experts_implementation`, whose functions (eager, batched_mm, grouped_mm,
…) all compute the same from the same attributes. Other classes (Llama 4's, for one) keep their parameters, and their
tensors are restored.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from swsc_core.hf.layer_replacement import put_layer
from swsc_core.hf.weight_names import Target, WeightNames
from swsc_core.layers.experts import REMEDY, SwscExperts, eager_error

_LEAF = re.compile(r"\.\*\.(\w+)\\?\.weight\$?$")
# The code that every decorated class runs as its forward pass. A subclass that defines its own forward pass runs other
# code.
_DECORATED_CODE = use_experts_implementation(type("_", (nn.Module,), {"forward": lambda _: None})).forward.__code__
_UNSUPPORTED_FLAGS = ("is_transposed", "has_bias", "has_post_expert_norm")


@dataclass(frozen=True)
class FusedExperts:
    """A module of fused experts that can be unfused.

    Attributes:
        path: name of the module.
        up, down: names of its two parameters.
        leaves: names of an expert's matrices; that of `down` is the last.
        patterns: source patterns of the conversions that fuse the experts.
    """

    path: str
    up: str
    down: str
    leaves: tuple[str, ...]
    patterns: frozenset[str]


def unfuse_experts(model: Any, tensors: Iterable[str], stored: Iterable[str], names: WeightNames) -> frozenset[str]:
    """Replace fused experts of the empty `model` by `SwscExperts` where one of `tensors` is fused with others.

    All experts that the same conversions fuse are unfused.

    Args:
        model: a transformers model on the meta device.
        tensors: names of the dense tensors that are compressed.
        stored: names of all tensors of the checkpoint.
        names: targets in the model.

    Returns:
        Source patterns of the conversions that are no longer applied. Empty if nothing is unfused, which is also the
        case if one of the conversions fuses tensors of a module that cannot be unfused.
    """
    fused = {experts.path: experts for experts in _fused_experts(model, names)}
    compressed_paths = {path for path, _ in _merge_targets(tensors, names)}
    unfused = frozenset[str]().union(*(fused[path].patterns for path in fused if path in compressed_paths))
    affected_paths = {path for path, pattern in _merge_targets({*tensors, *stored}, names) if pattern in unfused}
    if affected_paths - fused.keys():
        return frozenset()
    for experts in fused.values():
        if experts.patterns & unfused:
            module = model.get_submodule(experts.path)
            put_layer(model, experts.path, SwscExperts(module, experts.up, experts.down, experts.leaves))
            _skip_initialization(model.get_submodule(experts.path.rpartition(".")[0]))
    return unfused


def _skip_initialization(block: Any) -> None:
    """Stop transformers from initializing a block, whose code may access fused experts; its weights are all loaded."""
    persistent = block.state_dict()
    if all(name in persistent for name, _ in block.named_buffers(recurse=False)):
        block._is_hf_initialized = True


def _merge_targets(tensors: Iterable[str], names: WeightNames) -> Iterator[tuple[str, str]]:
    """(module, source pattern) of each tensor that is merged into a parameter of that module."""
    for parameter, pattern in map(names.target, tensors):
        if pattern and names.has_parameter(parameter):
            yield parameter.rpartition(".")[0], pattern


def _fused_experts(model: Any, names: WeightNames) -> Iterator[FusedExperts]:
    for path, module in model.named_modules():
        if not _has_standard_forward(module):
            continue
        up = "gate_up_proj" if module.has_gate else "up_proj"
        tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        up_sources, down_sources = _expert_sources(names, f"{path}.{up}"), _expert_sources(names, f"{path}.down_proj")
        if tensors == {up, "down_proj"} and up_sources and len(down_sources) == 1:
            patterns = frozenset((*up_sources.values(), *down_sources.values()))
            yield FusedExperts(path, up, "down_proj", (*up_sources, *down_sources), patterns)


def _has_standard_forward(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` computes with the experts of a module, as plain matrices [outputs, inputs].

    Where gates are fused with up projections, the gates are required to come first.
    """
    forward = type(module).forward
    if getattr(forward, "__code__", None) is not _DECORATED_CODE:
        return False
    if any(getattr(module, flag, False) for flag in _UNSUPPORTED_FLAGS) or not module.is_concatenated:
        return False
    is_standard: bool = getclosurevars(forward).nonlocals["experts_interface"] is ALL_EXPERTS_FUNCTIONS
    return is_standard


def _expert_sources(names: WeightNames, parameter: str) -> dict[str, str]:
    """Name of an expert's matrix -> source pattern, for the conversion that fuses all experts into `parameter`.

    Empty if there is none, or if it does more than stack and concatenate.
    """
    path = parameter.rpartition(".")[0]
    for converter in names.converters:
        leaves = [_LEAF.search(pattern) for pattern in converter._original_source_patterns]
        sources = {leaf[1]: pattern for leaf, pattern in zip(leaves, converter.source_patterns, strict=True) if leaf}
        targets = {names.target_of_renamed(f"{path}.0.{leaf}.weight") for leaf in sources}
        steps = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
        expected_steps = [(MergeModulelist, 0), (Concatenate, 1)][: min(len(leaves), 2)]
        expected_targets = {Target(parameter, pattern) for pattern in converter.source_patterns}
        if targets == expected_targets and steps == expected_steps:
            return sources if len(converter.operations) == len(steps) else {}
    return {}


def fuse_experts(model: Any, dtype: torch.dtype) -> None:
    """Replace unfused experts by fused ones of `dtype`; all their matrices have to be dense."""
    for path, experts in list(model.named_modules()):
        if isinstance(experts, SwscExperts):
            put_layer(model, path, experts.to_fused(dtype))


def experts_implementations(config: Any) -> dict[str, str | None]:
    """Experts implementation of a config ("") and its sub-configs, as `model.set_experts_implementation` takes it."""
    configs = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part._experts_implementation for name, part in configs.items() if part is not None}


def require_eager(model: Any, requested: Mapping[str, str | None]) -> None:
    """Set the experts implementation of a model with unfused experts to "eager": experts are computed one by one.

    Args:
        model: the model.
        requested: `experts_implementations` of the config before the model was created from it.

    Raises:
        ValueError: another implementation is requested, or distribution of the experts over processes.
    """
    if others := {name for name in requested.values() if name not in (None, "eager")}:
        raise ValueError(eager_error(others.pop()))
    if getattr(model.config, "distributed_config", None):
        raise ValueError("distributed_config: compressed experts are not distributed over processes; " + REMEDY)
    model.config._experts_implementation = "eager"
