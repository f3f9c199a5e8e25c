"""Check that the files of a model hold exactly the weights that config.json describes, in the same shapes.

transformers only warns of missing weights, which it fills with random numbers, and of unknown ones. This check runs the
loading code of transformers on empty tensors with the same names and shapes, before any work, and treats its findings
as errors.
"""

import re
from dataclasses import replace
from typing import Any

import torch

from pipeline.architectures.families import Family
from pipeline.architectures.model_config import ModelConfig
from pipeline.checkpoints.meta_model import (
    MetaModel,
    UnknownModel,
    class_is_named,
    meta_models_of,
    quiet_transformers,
    related_weight_names,
)
from pipeline.checkpoints.redundant_tensors import is_buffer
from pipeline.errors import CheckpointError, first_line
from pipeline.models.meta_loading import load_meta_model, loading_errors
from pipeline.models.mismatch import Mismatch, describe, first_of, is_incomplete, known_cause, layer_index
from pipeline.models.stored_model import Model

# Heads that predict several tokens, which no class of transformers loads.
_MULTI_TOKEN_HEAD = re.compile(r"(^|\.)mtp[._]")


def require_agreement(model: Model, trusted: bool = False, measured: bool = False) -> list[str]:
    """Compare the files of a model with its config.

    Args:
        model: the model.
        trusted: code that the model brings may be run.
        measured: the model must also predict tokens.

    Returns:
        Notes for the user: that the comparison is impossible, or that tensors are unused.

    Raises:
        CheckpointError: weights are missing, unknown or of other shapes.
    """
    root, config = model.checkpoint.store.root, model.checkpoint.config
    try:
        if trusted and "auto_map" in config:
            meta_models = [_load_with_own_code(root, measured)]
        else:
            meta_models = meta_models_of(config, root, len(model.checkpoint.tensors))
        is_substitute = "auto_map" in config and type(meta_models[0].model).__module__.startswith("transformers.")
        return _compare(model, meta_models, measured, is_substitute and not (trusted and measured))
    except UnknownModel as error:
        reason = str(error) if trusted else _why_not_comparable(root, config, str(error), measured)
        return [f"its weights are not compared with config.json ({reason})"]


def _load_with_own_code(root: str, measured: bool) -> MetaModel:
    """The model by the code that it brings. Raises UnknownModel without a causal LM in it, unless one is `measured`."""
    try:
        with loading_errors(root):
            return load_meta_model(root, trusted=True)
    except CheckpointError as error:
        if measured:
            raise
        raise UnknownModel(str(error)) from None


def _compare(model: Model, meta_models: list[MetaModel], measured: bool, is_substitute: bool) -> list[str]:
    """Compare the files with each model, and return notes.

    Args:
        model: the files.
        meta_models: the class in config.json, then the class that predicts tokens.
        measured: the model must also predict tokens.
        is_substitute: the class belongs to transformers, while the model brings its own; a difference then raises
            UnknownModel.
    """
    first, *others = [_load_empty(model, meta_model) for meta_model in meta_models]
    meta_model = meta_models[0]
    loaded_elsewhere = {name for other in meta_models[1:] for name in other.model.state_dict()}
    unknown = [name for name in first.unknown if name not in loaded_elsewhere]
    weights = [name for name in unknown if _looks_like_weight(name, meta_model.model)]
    if weights:
        weights = sorted({*weights} - related_weight_names(meta_model.config))
    mismatch = replace(first, unknown=weights)
    if not measured and not class_is_named(model.checkpoint.config):
        mismatch = _without_head(mismatch, meta_model.model)
    _require_none(model, mismatch, meta_model, is_substitute)
    if measured:
        for other, other_model in zip(others, meta_models[1:], strict=True):
            _require_none(model, replace(other, unknown=[]), other_model, is_substitute)
    if not unknown:
        return []
    return [f"{len(unknown)} tensors that {first.class_name} does not use are copied ({first_of(unknown)})"]


def _without_head(mismatch: Mismatch, model: Any) -> Mismatch:
    """The differences in the base model alone: config.json names no class, so any head, or none, is right."""
    prefix = f"{model.base_model_prefix}."
    missing = [name for name in mismatch.missing if name.startswith(prefix)]
    # If the base model is incomplete, the names of all unknown weights help to find the cause.
    is_complete = not missing and not mismatch.shapes
    unknown = [name for name in mismatch.unknown if name.startswith(prefix) or not is_complete]
    return replace(mismatch, missing=missing, unknown=unknown)


def _looks_like_weight(name: str, model: Any) -> bool:
    """Whether the last word of a tensor's name is that of a weight. Other tensors are buffers or belong to a tool."""
    return name.rpartition(".")[2] in {"weight", "bias", *(key.rpartition(".")[2] for key in model.state_dict())}


def _why_not_comparable(root: str, config: ModelConfig, reason: str, measured: bool) -> str:
    """Why the comparison is impossible.

    Raises CheckpointError if the model is `measured`, which is then impossible as well.
    """
    if "auto_map" not in config:
        if measured:
            raise CheckpointError(
                f"{root}: {reason}: the model cannot be evaluated or calibrated; install what is missing"
            )
        return reason
    if measured:
        raise CheckpointError(
            f"{root}: the model needs its own code, which runs only with your permission; read it, then add"
            " --trust-remote-code"
        )
    return "this needs the model's own code: --trust-remote-code"


def _load_empty(model: Model, meta_model: MetaModel) -> Mismatch:
    """What the loading code of transformers finds, on tensors without values."""
    cls, dtype = type(meta_model.model), torch.float32
    tensors = {name: torch.empty(model.shape(name), dtype=dtype, device="meta") for name in model.names}
    tensors |= {info.name: torch.empty(info.shape, dtype=dtype, device="meta") for info in model.checkpoint.buffers}
    try:
        with quiet_transformers():
            _, info = cls.from_pretrained(
                None,
                config=meta_model.config,
                state_dict=tensors,
                dtype=dtype,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{model.checkpoint.store.root}: the files do not fit the {cls.__name__} in config.json"
            f" ({first_line(error)}); repair config.json"
        ) from None
    shapes = [(name, list(stored), list(expected)) for name, stored, expected in sorted(info["mismatched_keys"])]
    unknown = [name for name in sorted(info["unexpected_keys"]) if not _is_unused(name, model)]
    return Mismatch(cls.__name__, sorted(info["missing_keys"]), unknown, shapes)


def _is_unused(name: str, model: Model) -> bool:
    """Whether no class of transformers uses a tensor: a buffer, or part of a head that predicts further tokens."""
    buffers = (info for info in model.checkpoint.buffers if is_buffer(info))
    if _MULTI_TOKEN_HEAD.search(name) or any(name.endswith(info.name) for info in buffers):
        return True
    family, config = Family(model.checkpoint.config), model.checkpoint.config
    further = config.get("num_nextn_predict_layers")
    index = layer_index(name)
    if not isinstance(further, int) or family.layers is None or index is None:
        return False
    return family.layers <= index < family.layers + further


def _require_none(model: Model, mismatch: Mismatch, meta_model: MetaModel, is_substitute: bool) -> None:
    """Raise CheckpointError if there is a mismatch, with its cause and a remedy.

    Raises UnknownModel if nothing but the use of a substitute for the model's own class explains it.
    """
    if not mismatch:
        return
    cause = known_cause(model, mismatch, meta_model)
    if cause is None and is_substitute and not is_incomplete(model, mismatch):
        raise UnknownModel(f"they are not those of {mismatch.class_name} in transformers")
    raise CheckpointError(f"{model.checkpoint.store.root}: {cause or describe(model, mismatch)}")
