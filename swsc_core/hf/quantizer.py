"""What transformers calls while it loads, saves and dequantizes a compressed model.

Before weights are read, headers are held against the config and layers are replaced on the meta device; what has no layer of
its own is restored on the way in (restoring.py). After that the model is as small as its files.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.base import HfQuantizer

from swsc_core.compressed.config_json import FORMAT_VERSION, CompressedTensor, compressed_tensors
from swsc_core.compressed.entry import Entry
from swsc_core.hf.compress_on_load import compress_loaded
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.dense_layers import DenseLayers, embeddings_of
from swsc_core.hf.experts import implementations, join, require_eager, unfuse_experts
from swsc_core.hf.headers import read_headers, require_parts, require_rest
from swsc_core.hf.layer_replacement import make_dense, place
from swsc_core.hf.model_checks import require_all, require_labels, require_place, require_shapes, require_unwrapped
from swsc_core.hf.restore_on_load import with_restoring
from swsc_core.hf.weight_names import WeightNames, saved_name, without
from swsc_core.layers.linear import CompressedWeight, SwscJoined


class SwscQuantizer(HfQuantizer):
    """Quantization method "swsc" of transformers."""

    requires_calibration = False
    quantization_config: SwscConfig

    def __init__(self, quantization_config: SwscConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._restored: list[str] = []
        self._stored: list[str] = []
        self._apart: frozenset[str] = frozenset()
        self._asked: dict[str, str | None] = {}
        self._dtype = torch.float32

    def update_attn_implementation(self, config: Any) -> Any:
        """Sees the config before the model is made, which fills in what nobody asked for."""
        self._asked = implementations(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        entries, config = self.quantization_config.tensors, self.quantization_config
        if not self.pre_quantized:
            if config.dequantize:
                raise ValueError(
                    "SwscConfig: dequantize: this checkpoint is not compressed; open it without SwscConfig"
                )
            return
        self._dtype, self._names = dtype or torch.get_default_dtype(), WeightNames(model)
        where = model.config.name_or_path
        if checkpoint_files:
            headers = read_headers(checkpoint_files)
            require_parts(headers, entries, where)
            self._stored = list(headers)
        if not config.dequantize:
            self._lay_apart(model)
        dense = DenseLayers(model)
        for tensor, compressed in compressed_tensors(entries).items():
            target, pattern = self._names.target(tensor)
            if not self._names.has_parameter(target):
                require_place(model, tensor, where)
            elif config.dequantize or pattern or not self._places(model, target, compressed, dense):
                self._restored.append(tensor)
            elif checkpoint_files and compressed.is_fused:
                require_rest(headers, tensor, model.get_submodule(target.removesuffix(".weight")), where)
        if checkpoint_files:
            require_all(model, WeightNames(model, self._apart), headers, where)
            require_shapes(model, self._names, headers, self._restored, where)
        self._kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _places(self, model: Any, target: str, tensor: CompressedTensor, dense: DenseLayers) -> bool:
        """Whether the layer of a tensor has been replaced by a compressed one; its parts have to find it by their names."""
        return self._names.lead_beside(tensor.name, tensor.entries) and place(model, target, tensor, self._dtype, dense)

    def _lay_apart(self, model: Any) -> None:
        self._apart = unfuse_experts(
            model, compressed_tensors(self.quantization_config.tensors), self._stored, self._names
        )
        if self._apart:
            self._names, self._implementations = WeightNames(model, self._apart), implementations(model.config)
            require_eager(model, self._asked)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """transformers' own conversions, with a step before them for what is restored while it is loaded."""
        self._own_conversions = list(weight_conversions)
        weight_conversions = without(weight_conversions, self._apart)
        if not self._restored:
            return weight_conversions
        entries = self.quantization_config.tensors
        return with_restoring(weight_conversions, self._restored, entries, self._stored, self._names, self._dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        if (model.tp_size or 1) > 1:  # it has cut centroids as if they were rows
            raise ValueError(
                "compressed layers are not split by transformers' tp_plan; serve them with vLLM, or `swsc restore` first"
            )
        if not self.pre_quantized:
            compress_loaded(model, self.quantization_config)
        else:
            self._convert_kinds(model)
            if self._restored:
                model._weight_conversions = [c for c in self._own_conversions if c.was_used()] or None
        for path, layer in model.named_modules():
            if isinstance(layer, CompressedWeight):
                require_labels(path, layer)
            if isinstance(layer, CompressedWeight | SwscJoined):
                _freeze(layer)
        if any(isinstance(one, CompressedWeight) for one in embeddings_of(model)):
            model.resize_token_embeddings = _refuse_to_resize
        return model

    def _convert_kinds(self, model: Any) -> None:
        """transformers 5.19 leaves what it renames in the dtype of the file."""
        kept = list(model._get_dtype_plan(self._dtype))  # what a model wants in float32, whatever is asked for
        keeps = build_glob_alternation(kept)[0] if kept else None
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dtype != self._kinds.get(name, tensor.dtype) and not (keeps and keeps.search(name)):
                tensor.data = tensor.data.to(self._kinds[name])

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config that was saved holds a name
        other = named is not None and named != model.dtype
        make_dense(model, named or self._dtype)
        if self._apart:
            join(model, named or self._dtype)
            model.config._experts_implementation = self._implementations
            model._weight_conversions = [
                c for c in self._own_conversions if c.was_used() or not without([c], self._apart)
            ]
        vars(model).pop("resize_token_embeddings", None)
        return model.to(named) if other else model  # layers of two dtypes would not fit each other

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called before a model is saved: its config says what is compressed by then, under the names that are written."""
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, CompressedWeight)}
        if not getattr(model, "_hf_peft_config_loaded", False):
            require_unwrapped(layers)
        tied = model.all_tied_weights_keys
        self.quantization_config.tensors = {
            saved_name(model, f"{path}.weight"): self._saved_entry(model, path, layer)
            for path, layer in layers.items()
            if f"{path}.weight" not in tied
        }
        model.config.quantization_config = self.quantization_config
        return None, {"swsc_format_version": str(FORMAT_VERSION)}

    @staticmethod
    def _saved_entry(model: Any, path: str, layer: CompressedWeight) -> Entry:
        """The entry of a layer; that of a part of a fused tensor names the tensor as it is saved."""
        location = layer.entry.location
        if location.tensor is None:
            return layer.entry
        tensor = saved_name(model, f"{path.rpartition('.')[0]}.weight")
        return replace(layer.entry, location=replace(location, tensor=tensor))

    def is_serializable(self) -> bool:
        """Compressed layers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through compressed layers: adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the forward pass."""
        return True


def _freeze(layer: nn.Module) -> None:
    """transformers lets every floating point parameter want a gradient; parts do when they are asked to. Biases are as ever."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name != "bias":
            parameter.requires_grad_(False)


def _refuse_to_resize(*_: Any, **__: Any) -> None:
    """Instead of `resize_token_embeddings`, which would change embeddings, find a compressed head, and stop half-way."""
    raise ValueError("compressed embeddings have as many rows as they have; call dequantize() first, then resize them")
