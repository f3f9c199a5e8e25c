"""Layers of an empty model, replaced by those that work from stored parts; and back again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from swsc_core.linear import CompressedWeight, SwscEmbedding, SwscLinear


def place(model: Any, parameter: str, entry: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Replace the layer whose weight is `parameter` by a compressed one on the meta device, and the head that is tied to it.

    Returns:
        Whether there is a layer that is known to use its weight as a matrix and for nothing else.

    Raises:
        ValueError: the layer's matrix has another shape than the entry.
    """
    if not _place(model, parameter, entry, dtype):
        return False
    for target, source in dict(model.all_tied_weights_keys).items():
        if parameter in (target, source):
            other = source if parameter == target else target
            if not _place(model, other, entry, dtype):
                raise ValueError(f"{parameter} is tied to {other}, which cannot be compressed; restore the model")
            _tie_parts(model, target.removesuffix(".weight"), source.removesuffix(".weight"))
    return True


def _tie_parts(model: Any, target: str, source: str) -> None:
    """transformers ties by two tables: one says what is tied at present, one what is not saved twice. Both want parameters."""
    layer = model.get_submodule(target)
    layer.tied = model.get_submodule(source).tied = True
    tied = {f"{target}.{part}": f"{source}.{part}" for part, tensor in layer.parts.items() if tensor.numel()}
    for part, empty in layer.named_buffers(recurse=False):
        layer.register_buffer(part, empty, persistent=False)  # nothing is stored for them a second time
    model.all_tied_weights_keys |= tied
    model._tied_weights_keys = (model._tied_weights_keys or {}) | tied


def _place(model: Any, parameter: str, entry: Mapping[str, Any], dtype: torch.dtype) -> bool:
    path, _, leaf = parameter.rpartition(".")
    layer = model.get_submodule(path) if leaf == "weight" else None
    made = None if layer is None else _compressed(layer, entry, dtype)
    if layer is None or made is None:
        return False
    if list(layer.weight.shape) != list(entry["shape"]):
        raise ValueError(f"{parameter} is {list(layer.weight.shape)} in this model, {entry['shape']} in its entry")
    _put(model, path, made)
    return True


def _compressed(layer: nn.Module, entry: Mapping[str, Any], dtype: torch.dtype) -> CompressedWeight | None:
    if type(layer) is nn.Linear:
        return SwscLinear(entry, layer.bias is not None, dtype, "meta")
    scale = getattr(layer, "scalar_embed_scale", None)  # Gemma's; other subclasses of Embedding do what they like
    if type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and scale is not None):
        return SwscEmbedding(entry, 1.0 if scale is None else float(scale), dtype, "meta")
    return None


def compress_layer(model: Any, path: str, made: SwscLinear) -> None:
    """Put `made` in the place of the layer `path`."""
    _put(model, path, made)


def make_dense(model: Any, dtype: torch.dtype) -> None:
    """Replace every compressed layer by a dense one, on the device of its parts.

    Raises:
        ValueError: parts that are damaged.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SwscLinear):
            _put(model, path, _dense_linear(layer, dtype))
        elif isinstance(layer, SwscEmbedding):
            _put(model, path, _dense_embedding(layer, dtype))
    vars(model).pop("_tied_weights_keys", None)  # the class says it again
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _dense_linear(layer: SwscLinear, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(layer.dense_weight().to(dtype))
    made.register_parameter("bias", layer.bias)
    return made


def _dense_embedding(layer: SwscEmbedding, dtype: torch.dtype) -> nn.Embedding:
    weight = layer.dense_weight().to(dtype)
    made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, _weight=weight)
    if layer.scale != 1:
        made.register_forward_hook(Scaled(layer.scale))
    return made


class Scaled:
    """What Gemma's embedding does beside looking up rows."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows * rows.new_tensor(self.scale)


def _put(model: Any, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
