"""Replacement of a model's dense layers by layers that compute from stored parts, and the way back."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swsc_core.compressed.config_json import CompressedTensor
from swsc_core.hf.dense_layers import DenseLayers
from swsc_core.layers.linear import SwscEmbedding, SwscJoined, SwscLinear
from swsc_core.storage.location import MatrixLocation

# Subclasses of nn.Linear that compute the same. Other subclasses may use their weight in another way and are restored.
_LINEAR_SUBCLASSES = {"FalconLinear"}


class LayerReplacer:
    """Replaces layers of a model on the meta device by compressed layers.

    Args:
        model: a transformers model.
        dtype: dtype of stored floating point parts in memory.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype, self._dense = model, dtype, DenseLayers(model)

    def replace(self, parameter: str, tensor: CompressedTensor) -> bool:
        """Replace the layer whose weight is `parameter`, and the layers that are tied to it.

        Returns:
            Whether the layers were replaced. If any of them may do more with its weight than multiply or look up rows,
            none is changed.

        Raises:
            ValueError: the layer's matrix and the entries of `tensor` have different shapes.
        """
        ties = dict(self._model.all_tied_weights_keys)
        source = ties.get(parameter, parameter)
        targets = [target for target, its_source in ties.items() if its_source == source]
        parameters = dict.fromkeys([parameter, source, *targets])
        layers = {name: self._compressed_layer(name, tensor, frozenset(parameters)) for name in parameters}
        replacements = {name: layer for name, layer in layers.items() if layer is not None}
        if len(replacements) < len(layers):
            return False
        for name, layer in replacements.items():
            put_layer(self._model, name.removesuffix(".weight"), layer)
        for target in targets:
            _tie_parts(self._model, target.removesuffix(".weight"), source.removesuffix(".weight"))
        return True

    def _compressed_layer(self, parameter: str, tensor: CompressedTensor, tied: frozenset[str]) -> nn.Module | None:
        """The compressed layer for that of `parameter`; None if it has no counterpart or has to stay dense."""
        path, _, leaf = parameter.rpartition(".")
        layer = self._model.get_submodule(path) if leaf == "weight" else None
        if layer is None or not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            return None
        try:
            compressed = _counterpart(layer, tensor, self._dtype)
        except ValueError as error:
            raise ValueError(f"{parameter} is {list(layer.weight.shape)} in this model: {error}") from None
        if compressed is None or self._dense.reason(path, _stores_floats(compressed), tied):
            return None
        return compressed


def _tie_parts(model: Any, target: str, source: str) -> None:
    """Tie the parts of two layers in both of transformers' tables: for the loaded model, and for what is saved once."""
    layer = model.get_submodule(target)
    layer.tied = model.get_submodule(source).tied = True
    ties = {f"{target}.{part}": f"{source}.{part}" for part, tensor in layer.parts.items() if tensor.numel()}
    # transformers ties parameters only; empty parts are buffers, and the file holds those of `source` alone
    for part, empty in layer.named_buffers(recurse=False):
        layer.register_buffer(part, empty, persistent=False)
    model.all_tied_weights_keys |= ties
    model._tied_weights_keys = (model._tied_weights_keys or {}) | ties


def _stores_floats(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight") if "weight" in dict(layer.named_parameters(recurse=False)) else None
    return weight is None or weight.is_floating_point()


def _counterpart(layer: Any, tensor: CompressedTensor, dtype: torch.dtype) -> nn.Module | None:
    """The layer that computes the same as `layer` from stored parts; None if `layer` may compute something else.

    Raises:
        ValueError: the layer's matrix has another shape or orientation than the entries state.
    """
    is_conv1d = type(layer) is Conv1D
    m, n = reversed(layer.weight.shape) if is_conv1d else layer.weight.shape
    if tensor.location.transposed != is_conv1d:  # a square matrix would be restored transposed without an error
        raise ValueError(
            "transposed differs between the model and the entry; use the config.json that belongs to the checkpoint"
        )
    is_linear = is_conv1d or type(layer) is nn.Linear or type(layer).__name__ in _LINEAR_SUBCLASSES
    has_bias = getattr(layer, "bias", None) is not None
    if tensor.is_fused:
        return _fused_linear(tensor, (m, n), has_bias, dtype) if is_linear else None
    entry = tensor.entries[""]
    _require_equal([m, n], list(entry.shape))
    if is_linear:
        return SwscLinear(entry, has_bias, dtype, "meta")
    # Gemma's embedding multiplies by a scale; other subclasses of nn.Embedding may do anything
    scale = getattr(layer, "scalar_embed_scale", None)
    if type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and scale is not None):
        return SwscEmbedding(entry, 1.0 if scale is None else float(scale), dtype, "meta")
    return None


def _fused_linear(tensor: CompressedTensor, shape: tuple[int, int], has_bias: bool, dtype: torch.dtype) -> SwscJoined:
    entries = list(tensor.entries.values())
    remaining_rows = shape[0] - sum(entry.shape[0] for entry in entries)
    _require_equal([shape[1]], [entries[0].shape[1]])
    return SwscJoined(tensor.entries, remaining_rows, has_bias, dtype, "meta")


def _require_equal(shape: list[int], entry_shape: list[int]) -> None:
    if shape != entry_shape:
        raise ValueError(
            f"the layer's matrix is {shape}, its entry states {entry_shape};"
            " use the config.json that belongs to the checkpoint"
        )


def make_dense(model: Any, dtype: torch.dtype) -> None:
    """Replace every compressed layer by a dense one of `dtype`, on the device of its parts.

    Raises:
        ValueError: the parts of a layer are damaged.
    """
    layers = dict(model.named_modules())
    for path, layer in layers.items():
        if isinstance(layers.get(path.rpartition(".")[0]), SwscJoined):
            continue  # a piece, which was replaced with the whole layer
        if isinstance(layer, SwscJoined):
            piece = next(iter(layer.pieces.values()))
            put_layer(model, path, _dense_linear(layer, piece.entry.location, dtype))
        elif isinstance(layer, SwscLinear):
            put_layer(model, path, _dense_linear(layer, layer.entry.location, dtype))
        elif isinstance(layer, SwscEmbedding):
            put_layer(model, path, _dense_embedding(layer, dtype))
    # the attribute of the class lists the tied parameters of the dense model
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _dense_linear(layer: SwscLinear | SwscJoined, location: MatrixLocation, dtype: torch.dtype) -> nn.Module:
    conv1d: Any = Conv1D
    with torch.device("meta"):
        m, n = layer.out_features, layer.in_features
        dense: nn.Module = conv1d(m, n) if location.transposed else nn.Linear(n, m, layer.bias is not None)
    dense.weight = nn.Parameter(location.to_checkpoint_layout(layer.dense_weight().to(dtype)))
    dense.register_parameter("bias", layer.bias)
    return dense


def _dense_embedding(layer: SwscEmbedding, dtype: torch.dtype) -> nn.Embedding:
    weight = layer.dense_weight().to(dtype)
    dense = nn.Embedding(layer.num_embeddings, layer.embedding_dim, _weight=weight)
    if layer.scale != 1:
        dense.register_forward_hook(ScaleOutput(layer.scale))
    return dense


class ScaleOutput:
    """Forward hook that multiplies the rows of an embedding by `scale`, as Gemma's embedding does."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows * rows.new_tensor(self.scale)


def put_layer(model: Any, path: str, layer: nn.Module) -> None:
    """Replace the module of `model` at `path` by `layer`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
