"""The low-rank part of a compressed model as a LoRA adapter, in the files that PEFT reads.

A compressed matrix is W' + leftᵀ · right; a LoRA layer computes W x + alpha / r · B A x. With W' as the dense weight, B = leftᵀ,
A = right and alpha = r nothing is lost. An adapter sits on linear layers alone: a matrix that is none in the loaded model (an
embedding, a tied head, a slice of fused experts) has to be restored whole.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.loading import ModelKey, meta_model
from pipeline.models.stored_model import Model
from swsc_core.compressed.codec import checked_matrix_of
from swsc_core.storage.location import MatrixLocation


def carried_by_adapter(model: Model, location: str, trusted: bool) -> dict[str, str]:
    """Tensor -> linear layer, of the compressed tensors whose low-rank part an adapter can carry.

    Raises:
        CheckpointError: transformers does not know the model.
        ConfigError: there is nothing that an adapter could carry.
    """
    from swsc_core.hf.weight_names import WeightNames

    ranked = [name for name, entry in model.entries.items() if entry.low_rank and entry.location == MatrixLocation()]
    if not ranked:
        raise ConfigError(f"{location}: no matrix has a low-rank part that an adapter could carry; drop --adapter")
    empty = meta_model(ModelKey(location, "auto", 1, trusted))
    names = WeightNames(empty)
    found = {name: _linear(empty, *names.target(name), list(model.entries[name].shape)) for name in ranked}
    carried = {name: path for name, path in found.items() if path}
    if not carried:
        raise ConfigError(
            f"{location}: {ranked[0]} and others with a low-rank part are no linear layers; drop --adapter"
        )
    return carried


def _linear(model: Any, parameter: str, merge: str | None, shape: list[int]) -> str | None:
    """The linear layer that has `parameter` for itself and as it is stored; None if there is none."""
    path, _, leaf = parameter.rpartition(".")
    tied = model.all_tied_weights_keys
    if merge or leaf != "weight" or parameter in tied or parameter in tied.values():
        return None
    layer = model.get_submodule(path)
    return path if type(layer) is nn.Linear and list(layer.weight.shape) == list(shape) else None


def adapter_config(model: Model, carried: Mapping[str, str]) -> dict[str, Any]:
    """adapter_config.json: a rank for each layer, and alpha = rank, so that B A counts as it stands."""
    ranks = {path: model.entries[name].low_rank for name, path in carried.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # it lies beside, wherever both are moved to
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def adapter_tensors(model: Model, carried: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """A [r, n] and B [m, r] of each layer, with their names in adapter_model.safetensors."""
    for name, path in carried.items():
        left, right = checked_matrix_of(model.read_parts(name), model.entries[name]).low_rank_part()
        yield f"base_model.model.{path}.lora_A.weight", right
        yield f"base_model.model.{path}.lora_B.weight", left.T


def adapter_bytes(model: Model, carried: Mapping[str, str]) -> int:
    """Bytes of the adapter's tensors, at most."""
    entries = [model.entries[name] for name in carried]
    return sum(4 * entry.low_rank * sum(entry.shape) for entry in entries)
