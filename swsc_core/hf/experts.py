"""Experts laid apart in an empty model, so that each of their matrices is a layer that may be a compressed one; and joined again.

transformers 5 joins the experts of a layer while it loads them. Which classes may be taken apart is not guessed from names: it is
those that hand their forward pass over to `use_experts_implementation`, whose functions (eager, batched_mm, grouped_mm, …) all
calculate the same by the same attributes. All others (Llama 4, say) keep their parameters, and what is compressed is restored.
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
from swsc_core.hf.weight_names import WeightNames
from swsc_core.layers.experts import REMEDY, SwscExperts, eager_error

_LEAF = re.compile(r"\.\*\.(\w+)\\?\.weight\$?$")
# the code that every class decorated so runs as its forward pass; a subclass with a forward pass of its own runs another
_HANDED_OVER = use_experts_implementation(type("_", (nn.Module,), {"forward": lambda _: None})).forward.__code__


@dataclass(frozen=True)
class FusedExperts:
    """Joined experts that can be laid apart.

    Attributes:
        up, down: names of the two parameters.
        leaves: names of an expert's matrices, that of `down` last.
        patterns: of the merges that join them.
    """

    path: str
    up: str
    down: str
    leaves: tuple[str, ...]
    patterns: frozenset[str]


def unfuse_experts(model: Any, tensors: Iterable[str], stored: Iterable[str], names: WeightNames) -> frozenset[str]:
    """Lay experts apart, on the meta device, where one of `tensors` is joined with others; all that the same merges join.

    Args:
        tensors: dense names of what is compressed.
        stored: names of all tensors of the checkpoint.

    Returns:
        Patterns of the merges that are not applied any more; empty if they also fuse what cannot be unfused.
    """
    stacks = {stack.path: stack for stack in _stacks(model, names)}
    wanted = {path for path, _ in _merges(tensors, names)}
    hit = frozenset().union(*(stack.patterns for path, stack in stacks.items() if path in wanted))
    merged = {path for path, pattern in _merges({*tensors, *stored}, names) if pattern in hit}
    if merged - stacks.keys():
        return frozenset()
    for stack in stacks.values():
        if stack.patterns & hit:
            joined = model.get_submodule(stack.path)
            put_layer(model, stack.path, SwscExperts(joined, stack.up, stack.down, stack.leaves))
            _pass_over(model.get_submodule(stack.path.rpartition(".")[0]))
    return hit


def _pass_over(block: Any) -> None:
    """Have transformers not initialize a block of experts, which may ask for them fused; checking.py sees that no weight is missing."""
    persistent = block.state_dict()
    if all(name in persistent for name, _ in block.named_buffers(recurse=False)):
        block._is_hf_initialized = True


def _merges(tensors: Iterable[str], names: WeightNames) -> Iterator[tuple[str, str]]:
    """Of each of `tensors` that is merged: the module whose parameter it becomes part of, and the pattern of the merge."""
    for target, pattern in map(names.target, tensors):
        if pattern and names.has_parameter(target):
            yield target.rpartition(".")[0], pattern


def _stacks(model: Any, names: WeightNames) -> Iterator[FusedExperts]:
    for path, module in model.named_modules():
        if not _hands_over(module):
            continue
        up = "gate_up_proj" if module.has_gate else "up_proj"
        own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        wide, narrow = _sources(names, f"{path}.{up}"), _sources(names, f"{path}.down_proj")
        if own == {up, "down_proj"} and wide and len(narrow) == 1:
            yield FusedExperts(path, up, "down_proj", (*wide, *narrow), frozenset((*wide.values(), *narrow.values())))


def _hands_over(module: nn.Module) -> bool:
    """Whether the module's class is one of experts whose weights are plain matrices [outputs, inputs], gates before the rest."""
    forward = type(module).forward
    if getattr(forward, "__code__", None) is not _HANDED_OVER:
        return False
    odd = ("is_transposed", "has_bias", "has_post_expert_norm")  # the last is not known to all releases
    if any(getattr(module, kind, False) for kind in odd) or not module.is_concatenated:
        return False
    found: bool = getclosurevars(forward).nonlocals["experts_interface"] is ALL_EXPERTS_FUNCTIONS
    return found


def _sources(names: WeightNames, parameter: str) -> dict[str, str]:
    """Name of an expert's matrix -> pattern, of the merge that does nothing but put all experts into `parameter`; else none."""
    path = parameter.rpartition(".")[0]
    for converter in names.converters:
        leaves = [_LEAF.search(pattern) for pattern in converter._original_source_patterns]
        found = {leaf[1]: pattern for leaf, pattern in zip(leaves, converter.source_patterns, strict=True) if leaf}
        asked = {names.merged(f"{path}.0.{leaf}.weight") for leaf in found}
        done = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
        wanted = [(MergeModulelist, 0), (Concatenate, 1)][: min(len(leaves), 2)]
        if asked == {(parameter, pattern) for pattern in converter.source_patterns} and done == wanted:
            return found if len(converter.operations) == len(done) else {}
    return {}


def join(model: Any, dtype: torch.dtype) -> None:
    """Put joined experts in the place of those that were laid apart, whose matrices are all dense by now."""
    for path, experts in list(model.named_modules()):
        if isinstance(experts, SwscExperts):
            put_layer(model, path, experts.to_fused(dtype))


def implementations(config: Any) -> dict[str, str | None]:
    """Which experts implementation a config and its parts name, as `model.set_experts_implementation` takes it."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part._experts_implementation for name, part in parts.items() if part is not None}


def require_eager(model: Any, asked: Mapping[str, str | None]) -> None:
    """Have the config of a model whose experts are laid apart say so: they are worked through one by one.

    Args:
        asked: as `implementations` says of the config before the model was made of it.

    Raises:
        ValueError: another implementation was asked for, or that the model be spread over processes.
    """
    if other := {name for name in asked.values() if name not in (None, "eager")}:
        raise ValueError(eager_error(other.pop()))
    if getattr(model.config, "distributed_config", None):
        raise ValueError("distributed_config: experts that stay compressed are not spread; " + REMEDY)
    model.config._experts_implementation = "eager"
