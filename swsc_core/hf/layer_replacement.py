"""Layers of an empty model, replaced by those that work from stored parts; and back again."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swsc_core.compressed.config_json import CompressedTensor
from swsc_core.hf.dense_layers import DenseLayers
from swsc_core.layers.linear import SwscEmbedding, SwscJoined, SwscLinear
from swsc_core.storage.location import MatrixLocation

# subclasses of nn.Linear that do what it does; others may look at their weight in ways of their own, and are restored
_LINEAR = {"FalconLinear"}


def place(model: Any, parameter: str, tensor: CompressedTensor, dtype: torch.dtype, dense: DenseLayers) -> bool:
    """Replace the layer whose weight is `parameter` by a compressed one on the meta device, and those that are tied to it.

    Args:
        dense: which layers of the model have to be dense.

    Returns:
        Whether there is a layer that is known to use its weight as a matrix and for nothing else; if not, nothing was changed.

    Raises:
        ValueError: the layer's matrix has another shape than the entries say.
    """
    tied = dict(model.all_tied_weights_keys)
    held = tied.get(parameter, parameter)
    pairs = [(target, source) for target, source in tied.items() if source == held]
    names = dict.fromkeys([parameter, held, *(target for target, _ in pairs)])
    made = [_made(model, name, tensor, dtype, dense, frozenset(names)) for name in names]
    layers = [layer for layer in made if layer is not None]
    if len(layers) < len(names):
        return False
    for name, layer in zip(names, layers, strict=True):
        put_layer(model, name.removesuffix(".weight"), layer)
    for target, source in pairs:
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


def _made(
    model: Any, parameter: str, tensor: CompressedTensor, dtype: torch.dtype, dense: DenseLayers, tied: frozenset[str]
) -> nn.Module | None:
    """The compressed layer for that of `parameter`; None for what is no such layer, or has to be dense."""
    path, _, leaf = parameter.rpartition(".")
    layer = model.get_submodule(path) if leaf == "weight" else None
    if layer is None or not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        return None
    try:
        made = _compressed(layer, tensor, dtype)
    except ValueError as error:
        raise ValueError(f"{parameter} is {list(layer.weight.shape)} in this model: {error}") from None
    return None if made is None or dense.reason(path, _stores_floats(made), tied) else made


def _stores_floats(made: nn.Module) -> bool:
    weight = made.get_parameter("weight") if "weight" in dict(made.named_parameters(recurse=False)) else None
    return weight is None or weight.is_floating_point()


def _compressed(layer: Any, tensor: CompressedTensor, dtype: torch.dtype) -> nn.Module | None:
    """What works as `layer` does from stored parts; None if it does something else. ValueError for a matrix of another shape."""
    entry = next(iter(tensor.entries.values()))
    transposed = type(layer) is Conv1D
    shape = list(layer.weight.shape)[:: -1 if transposed else 1]
    if tensor.location.transposed != transposed:  # a square matrix would be restored transposed, silently
        raise ValueError("transposed differs between the model and the entry; take the config that belongs to it")
    linear = type(layer) is Conv1D or type(layer) is nn.Linear or type(layer).__name__ in _LINEAR
    if tensor.is_fused:
        if not linear:
            return None
        rest = shape[0] - sum(piece.shape[0] for piece in tensor.entries.values())
        _require_shape(shape[1:], list(entry.shape[1:]))
        return SwscJoined(tensor.entries, rest, layer.bias is not None, dtype, "meta")
    scale = getattr(layer, "scalar_embed_scale", None)  # Gemma's; other subclasses of Embedding do what they like
    _require_shape(shape, list(entry.shape))
    if linear:
        return SwscLinear(entry, layer.bias is not None, dtype, "meta")
    if type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and scale is not None):
        return SwscEmbedding(entry, 1.0 if scale is None else float(scale), dtype, "meta")
    return None


def _require_shape(own: list[int], said: list[int]) -> None:
    if own != list(said):
        raise ValueError(f"matrix of {own}, {list(said)} in its entry; take the config that belongs to it")


def make_dense(model: Any, dtype: torch.dtype) -> None:
    """Replace every compressed layer by a dense one, on the device of its parts.

    Raises:
        ValueError: parts that are damaged.
    """
    layers = dict(model.named_modules())
    for path, layer in layers.items():
        if isinstance(layers.get(path.rpartition(".")[0]), SwscJoined):
            continue  # a piece, which went with the whole
        if isinstance(layer, SwscJoined):
            piece = next(iter(layer.pieces.values()))
            put_layer(model, path, _dense_linear(layer, piece.entry.location, dtype))
        elif isinstance(layer, SwscLinear):
            put_layer(model, path, _dense_linear(layer, layer.entry.location, dtype))
        elif isinstance(layer, SwscEmbedding):
            put_layer(model, path, _dense_embedding(layer, dtype))
    vars(model).pop("_tied_weights_keys", None)  # the class says it again
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _dense_linear(layer: SwscLinear | SwscJoined, location: MatrixLocation, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        m, n = layer.out_features, layer.in_features
        made = Conv1D(m, n) if location.transposed else nn.Linear(n, m, layer.bias is not None)
    made.weight = nn.Parameter(location.to_checkpoint_layout(layer.dense_weight().to(dtype)))
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


def put_layer(model: Any, path: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
