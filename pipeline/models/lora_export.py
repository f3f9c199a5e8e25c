"""Export of the low-rank part of a compressed model as a LoRA adapter, in the files that PEFT reads.

A compressed matrix is W' + leftᵀ · right, and a LoRA layer computes W x + alpha / r · B A x. With W' as the dense
weight, B = leftᵀ, A = right and alpha = r, both are equal. PEFT adapts linear layers only: a matrix that is not a
linear layer of the loaded model (an embedding, a tied head, a slice of fused experts) is restored together with its
low-rank part.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.loading import ModelKey, meta_model
from pipeline.models.stored_model import Model
from swsc_core.compressed.codec import checked_matrix_of
from swsc_core.storage.json_fields import JsonValue
from swsc_core.storage.location import MatrixLocation


def carried_by_adapter(model: Model, location: str, trusted: bool) -> dict[str, str]:
    """Return the compressed tensors whose low-rank part an adapter can hold, each with the name of its linear layer.

    Args:
        model: the compressed model.
        location: where it is, to load its class.
        trusted: code that the model brings may be run.

    Raises:
        CheckpointError: transformers does not know the model.
        ConfigError: no low-rank part can be exported.
    """
    from swsc_core.hf.weight_names import WeightNames

    ranked = [name for name, entry in model.entries.items() if entry.low_rank and entry.location == MatrixLocation()]
    if not ranked:
        raise ConfigError(f"{location}: no matrix has a low-rank part that an adapter can hold; remove --adapter")
    loaded = meta_model(ModelKey(location, "auto", 1, trusted))
    names = WeightNames(loaded)
    layers = {name: _linear(loaded, *names.target(name), list(model.entries[name].shape)) for name in ranked}
    carried = {name: path for name, path in layers.items() if path}
    if not carried:
        raise ConfigError(
            f"{location}: no matrix with a low-rank part is a linear layer ({ranked[0]}, for example); remove --adapter"
        )
    return carried


def _linear(model: Any, parameter: str, merge: str | None, shape: list[int]) -> str | None:
    """Name of the linear layer whose weight is `parameter`, untied and in the stored layout; None if there is none."""
    path, _, leaf = parameter.rpartition(".")
    tied = model.all_tied_weights_keys
    if merge or leaf != "weight" or parameter in tied or parameter in tied.values():
        return None
    layer = model.get_submodule(path)
    return path if type(layer) is nn.Linear and list(layer.weight.shape) == list(shape) else None


def adapter_config(model: Model, carried: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the content of adapter_config.json: a rank for each layer, and alpha = rank, which scales B A by 1."""
    ranks = {path: model.entries[name].low_rank for name, path in carried.items()}
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != most_common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # The dense model is next to the adapter, wherever both are moved.
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": most_common,
        "lora_alpha": most_common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def adapter_tensors(model: Model, carried: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield A [r, n] and B [m, r] of each layer, with their names in adapter_model.safetensors."""
    for name, path in carried.items():
        left, right = checked_matrix_of(model.read_parts(name), model.entries[name]).low_rank_part()
        yield f"base_model.model.{path}.lora_A.weight", right
        yield f"base_model.model.{path}.lora_B.weight", left.T


def adapter_bytes(model: Model, carried: Mapping[str, str]) -> int:
    """Return an upper bound of the bytes of the adapter's tensors."""
    entries = [model.entries[name] for name in carried]
    return sum(4 * entry.low_rank * sum(entry.shape) for entry in entries)
