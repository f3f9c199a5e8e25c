"""Whether the files hold the weights of the model that config.json describes: all of them, no others, in the same shapes.

transformers only warns of weights that are missing, which it fills with random numbers, and of those that it does not know. Here
its own loading code is run on empty tensors of the same names and shapes, before any work, and what it finds is an error.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.architectures.families import Family
from pipeline.architectures.model_config import ModelConfig
from pipeline.architectures.tensor_names import tensor_kind
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
from pipeline.models.stored_model import Model

# segments that wrappers leave in the names of a model's parameters -> who does, and how the model inside is saved
_WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
    "base_layer": "PEFT",
    "model": "a wrapper",
}
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_PREDICTS_MORE = re.compile(r"(^|\.)mtp[._]")  # heads that predict several tokens, which no class of transformers loads


@dataclass(frozen=True)
class Verdict:
    """What loading found, by the names that the class gives to parameters.

    Attributes:
        mismatched: name, shape in the files, shape by config.json.
    """

    kind: str
    missing: list[str]
    unknown: list[str]
    mismatched: list[tuple[str, list[int], list[int]]]


def require_agreement(model: Model, trusted: bool = False, measured: bool = False) -> list[str]:
    """Compare a model's files with its config; returns what a person should know: that it cannot be done, or of idle tensors.

    Args:
        trusted: code that the model brings may be run.
        measured: the model must predict tokens, too.

    Raises:
        CheckpointError: weights are missing, unknown or of other sizes.
    """
    where, config = model.checkpoint.store.root, model.checkpoint.config
    try:
        if trusted and "auto_map" in config:
            meta_models = [_own(where, measured)]
        else:
            meta_models = meta_models_of(config, where, len(model.checkpoint.tensors))
        stands_in = "auto_map" in config and type(meta_models[0].model).__module__.startswith("transformers.")
        return _compared(model, meta_models, measured, stands_in and not (trusted and measured))
    except UnknownModel as error:
        why = str(error) if trusted else _unknown(where, config, str(error), measured)
        return [f"its weights are not compared with config.json ({why})"]


def _own(where: str, measured: bool) -> MetaModel:
    """The model by the code that it brings; Unknown if that has none that predicts tokens, which needs not be so unless measured."""
    try:
        with loading_errors(where):
            return load_meta_model(where, trusted=True)
    except CheckpointError as error:
        if measured:
            raise
        raise UnknownModel(str(error)) from None


def _compared(model: Model, meta_models: list[MetaModel], measured: bool, stands_in: bool) -> list[str]:
    """As `require_agreement`.

    Args:
        stands_in: a class of transformers for one that the model brings, whose weights the files may be: Unknown if they do not fit.
    """
    first, *others = [_verdict(model.checkpoint.store.root, model, one) for one in meta_models]
    known = {name for one in meta_models[1:] for name in one.model.state_dict()}
    unknown = [name for name in first.unknown if name not in known]
    weights = [name for name in unknown if _is_weight(name, meta_models[0].model)]
    if weights:
        weights = sorted({*weights} - related_weight_names(meta_models[0].config))
    wanted = Verdict(first.kind, first.missing, weights, first.mismatched)
    if not measured and not class_is_named(model.checkpoint.config):
        wanted = _of_body(wanted, meta_models[0].model)
    _require(model, wanted, meta_models[0], stands_in)
    for other, one in zip(others, meta_models[1:], strict=True):
        if measured:
            _require(model, Verdict(other.kind, other.missing, [], other.mismatched), one, stands_in)
    return (
        [f"{len(unknown)} tensors that {first.kind} has no use for are copied ({_shown(unknown)})"] if unknown else []
    )


def _of_body(verdict: Verdict, model: Any) -> Verdict:
    """What is left of a verdict where nobody says which head the files hold: with a whole body any head will do, and none."""
    inside = f"{model.base_model_prefix}."
    missing = [name for name in verdict.missing if name.startswith(inside)]
    whole = not missing and not verdict.mismatched  # if not, the names of what is unknown tell why
    unknown = [name for name in verdict.unknown if name.startswith(inside) or not whole]
    return Verdict(verdict.kind, missing, unknown, verdict.mismatched)


def _is_weight(name: str, model: Any) -> bool:
    """Whether a tensor that the model does not have is called as its weights are: others are buffers, or of some tool."""
    return name.rpartition(".")[2] in {"weight", "bias", *(own.rpartition(".")[2] for own in model.state_dict())}


def _unknown(where: str, config: ModelConfig, reason: str, measured: bool) -> str:
    """Why nothing can be compared; CheckpointError if nothing can be measured then, either."""
    if "auto_map" not in config:
        if measured:
            raise CheckpointError(f"{where}: {reason}: it cannot be measured or calibrated; install what is missing")
        return reason
    if measured:
        raise CheckpointError(
            f"{where}: needs code of its own, which is not run unasked; read it, then add --trust-remote-code"
        )
    return "that needs code of its own: --trust-remote-code"


def _verdict(where: str, model: Model, meta_model: MetaModel) -> Verdict:
    """What transformers' own loading finds, on tensors that have names and shapes alone."""
    kind = torch.float32
    own = {name: torch.empty(model.shape(name), dtype=kind, device="meta") for name in model.names}
    own |= {info.name: torch.empty(info.shape, dtype=kind, device="meta") for info in model.checkpoint.buffers}
    try:
        with quiet_transformers():
            _, info = type(meta_model.model).from_pretrained(
                None, config=meta_model.config, state_dict=own, dtype=kind, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except RuntimeError as error:
        raise CheckpointError(
            f"{where}: the files do not hold the {type(meta_model.model).__name__} that config.json describes ({first_line(error)});"
            " repair config.json"
        ) from None
    mismatched = [(name, list(found), list(wanted)) for name, found, wanted in sorted(info["mismatched_keys"])]
    unknown = [name for name in sorted(info["unexpected_keys"]) if not _is_known(name, model)]
    return Verdict(type(meta_model.model).__name__, sorted(info["missing_keys"]), unknown, mismatched)


def _is_known(name: str, model: Model) -> bool:
    """Whether a tensor that no class loads is one that is known to be idle: a buffer, or a head that predicts further tokens."""
    if _PREDICTS_MORE.search(name) or any(
        is_buffer(info) and name.endswith(info.name) for info in model.checkpoint.buffers
    ):
        return True
    family, config = Family(model.checkpoint.config), model.checkpoint.config
    further = config.get("num_nextn_predict_layers")
    index = _layer_of(name)
    if not isinstance(further, int) or family.layers is None or index is None:
        return False
    return family.layers <= index < family.layers + further


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _require(model: Model, verdict: Verdict, meta_model: MetaModel, stands_in: bool) -> None:
    """Raise CheckpointError that says what of config.json and files is at fault, and what helps.

    Unknown: nothing explains the difference but that the class `stands_in` for the model's own.
    """
    if not (verdict.missing or verdict.unknown or verdict.mismatched):
        return
    reasons = (_wrapped(verdict), _other_layers(model, verdict), _other_sizes(verdict), _no_head(verdict, meta_model))
    found = next(filter(None, reasons), None)
    if found is None and stands_in and not _are_incomplete(model, verdict):
        raise UnknownModel(f"they are not those of transformers' own {verdict.kind}")
    raise CheckpointError(f"{model.checkpoint.store.root}: {found or _other_weights(model, verdict)}")


def _wrapped(verdict: Verdict) -> str | None:
    """The names are the model's but for what a wrapper put into them."""
    wanted = set(verdict.missing)
    found = Counter(prefix for prefix in (_wrapping(name, wanted) for name in verdict.unknown) if prefix)
    if 2 * found.total() < len(wanted) or not found:
        return None
    wrapping = found.most_common(1)[0][0]
    who = next((_WRAPPERS[part] for part in wrapping.split(".") if part in _WRAPPERS), "a wrapper")
    how = "merge the adapter (merge_and_unload)" if who == "PEFT" else "save the model inside the wrapper"
    return (
        f"names of the files hold '{wrapping}.', as {who} leaves it, which {verdict.kind} does not know ({verdict.unknown[0]} first);"
        f" {how} by its save_pretrained, or take it out of the names"
    )


def _wrapping(name: str, wanted: set[str]) -> str | None:
    """What has to be taken out of a name to make it one of `wanted`."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        if ".".join(parts[count:]) in wanted:
            return ".".join(parts[:count])
    bare = [part for part in parts if part not in _WRAPPERS or part == "model"]
    for count in range(min(3, len(bare))):
        if len(bare) < len(parts) and ".".join(bare[count:]) in wanted:
            return next(part for part in parts if part not in bare)
    return None


def _other_layers(model: Model, verdict: Verdict) -> str | None:
    """config.json has another number of layers."""
    layers = Family(model.checkpoint.config).layers
    held = {index for name in model.names if (index := _layer_of(name)) is not None}
    if layers is None or not held:
        return None
    more = [name for name in verdict.unknown if (_layer_of(name) or 0) >= layers]
    if more and not verdict.missing and len(more) == len(verdict.unknown):
        return (
            f"config.json says {layers} layers, and the files hold {len(more)} weights of further ones ({more[0]} first);"
            " repair config.json, which is not that of these files"
        )
    fewer = [name for name in verdict.missing if (_layer_of(name) or 0) > max(held)]
    if fewer and len(fewer) == len(verdict.missing):
        return (
            f"config.json says {layers} layers, and the files end with layer {max(held)} ({fewer[0]} is missing); repair config.json,"
            " or give all files of the model"
        )
    return None


def _other_sizes(verdict: Verdict) -> str | None:
    if not verdict.mismatched:
        return None
    name, found, wanted = verdict.mismatched[0]
    return (
        f"{name} is {found} in the files, and {wanted} by config.json ({len(verdict.mismatched)} of other sizes in all);"
        " repair config.json, which is not that of these files"
    )


def _no_head(verdict: Verdict, meta_model: MetaModel) -> str | None:
    head = meta_model.model.get_output_embeddings()
    names = {
        f"{path}.weight" for path, module in meta_model.model.named_modules() if module is head and head is not None
    }
    if verdict.unknown or not verdict.missing or not names >= {*verdict.missing}:
        return None
    return (
        f"the files hold no output head ({verdict.missing[0]}), and by config.json {verdict.kind} does not share it with the embedding;"
        " set tie_word_embeddings to true in config.json if it does, or give files that hold it"
    )


def _other_weights(model: Model, verdict: Verdict) -> str:
    parts = []
    if verdict.missing:
        parts.append(f"lack {len(verdict.missing)} weights ({_shown(verdict.missing)})")
    if verdict.unknown:
        parts.append(f"hold {len(verdict.unknown)} unknown weights ({_shown(verdict.unknown)})")
    incomplete = _are_incomplete(model, verdict)
    remedy = "give all files of the model" if incomplete else "repair config.json, which is not that of these files"
    return f"the files {' and '.join(parts)} of the {verdict.kind} that config.json describes; {remedy}"


def _are_incomplete(model: Model, verdict: Verdict) -> bool:
    """Whether the files hold such weights as are missing, of other layers."""
    stored = {_kind(name) for name in model.names}
    return not verdict.unknown and any(_kind(name) in stored for name in verdict.missing)


def _kind(name: str) -> str:
    """A name but for the numbers and the beginning of it, which transformers may change."""
    return tensor_kind(name).rpartition(".N.")[2]


def _shown(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} first" if others else first
