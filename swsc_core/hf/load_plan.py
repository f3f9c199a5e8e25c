"""`LoadPlan`: how each tensor of a compressed checkpoint is loaded, decided once on the empty model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swsc_core.compressed.config_json import CompressedTensor, compressed_tensors
from swsc_core.compressed.entry import Entry
from swsc_core.hf.checkpoint_checks import (
    CheckpointHeaders,
    require_all_parameters,
    require_parameter_for,
    require_shapes,
)
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.experts import experts_implementations, require_eager, unfuse_experts
from swsc_core.hf.layer_replacement import LayerReplacer
from swsc_core.hf.weight_names import WeightNames


@dataclass(frozen=True)
class LoadPlan:
    """How the tensors of one compressed checkpoint are loaded into one model.

    Attributes:
        dtype: dtype that the model computes in.
        entries: matrix name -> entry.
        stored: names of all tensors in the files; empty if the model is not loaded from files.
        names: targets of the stored tensors, as of before layers were replaced.
        restored: names of the compressed tensors that are restored to dense ones while they are loaded.
        unfused: source patterns of transformers' conversions that are not applied, because their experts stay unfused.
        experts_implementations: experts implementation per sub-config ("" for the config itself) before experts were
            unfused.
        parameter_dtypes: dtype of each parameter and buffer of the empty model, after layers were replaced.
    """

    dtype: torch.dtype
    entries: Mapping[str, Entry]
    stored: tuple[str, ...]
    names: WeightNames
    restored: tuple[str, ...]
    unfused: frozenset[str]
    experts_implementations: Mapping[str, str | None]
    parameter_dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class LoadRequest:
    """What the caller of `from_pretrained` asks for.

    Attributes:
        config: configuration of the checkpoint, with the caller's `dequantize`.
        dtype: dtype that the model computes in.
        experts_implementations: experts implementation per sub-config that the caller asks for; None where unspecified.
    """

    config: SwscConfig
    dtype: torch.dtype
    experts_implementations: Mapping[str, str | None]


def make_load_plan(model: Any, request: LoadRequest, checkpoint: CheckpointHeaders | None) -> LoadPlan:
    """Replace layers of the empty `model` by compressed ones, and plan how all tensors are loaded.

    Args:
        model: a transformers model on the meta device, changed in place.
        request: what the caller asks for.
        checkpoint: headers of the files; None if the model is not loaded from files.

    Raises:
        ValueError: the files, config.json and the model do not fit each other, or the request cannot be served.
    """
    entries = request.config.tensors
    stored = tuple(checkpoint.tensors) if checkpoint else ()
    if checkpoint:
        checkpoint.require_entries(entries)
    implementations = experts_implementations(model.config)
    unfused = frozenset[str]() if request.config.dequantize else _unfuse(model, entries, stored, request)
    names = WeightNames(model, unfused)
    restored = tuple(_restored_tensors(model, names, request, checkpoint))
    if checkpoint:
        require_all_parameters(model, WeightNames(model, unfused), checkpoint)
        require_shapes(model, names, checkpoint, restored)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return LoadPlan(request.dtype, entries, stored, names, restored, unfused, implementations, dtypes)


def _unfuse(model: Any, entries: Mapping[str, Entry], stored: Iterable[str], request: LoadRequest) -> frozenset[str]:
    unfused = unfuse_experts(model, compressed_tensors(entries), stored, WeightNames(model))
    if unfused:
        require_eager(model, request.experts_implementations)
    return unfused


def _restored_tensors(
    model: Any, names: WeightNames, request: LoadRequest, checkpoint: CheckpointHeaders | None
) -> list[str]:
    """Replace the layers of all compressed tensors where possible; names of the tensors whose layers stay dense."""
    restored, replacer = [], LayerReplacer(model, request.dtype)
    for tensor in compressed_tensors(request.config.tensors).values():
        parameter, pattern = names.target(tensor.name)
        if not names.has_parameter(parameter):
            require_parameter_for(model, tensor.name, model.config.name_or_path)
        elif request.config.dequantize or pattern or not _replace(replacer, names, parameter, tensor):
            restored.append(tensor.name)
        elif checkpoint and tensor.is_fused:
            weight = model.get_submodule(parameter.removesuffix(".weight")).weight
            checkpoint.require_remaining_rows(tensor.name, tuple(weight.shape))
    return restored


def _replace(replacer: LayerReplacer, names: WeightNames, parameter: str, tensor: CompressedTensor) -> bool:
    """Replace the layer of a tensor if its parts are loaded under the names that the compressed layer gives them."""
    return names.renames_parts_alike(tensor.name, tensor.entries) and replacer.replace(parameter, tensor)
