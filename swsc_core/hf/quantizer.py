"""`SwscQuantizer`: the hooks that transformers calls while it loads, saves and dequantizes a compressed model.

The first hook plans how every tensor is loaded (load_plan.py); the later hooks carry the plan out. A loaded model takes
as much memory as its files.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.base import HfQuantizer

from swsc_core.compressed.config_json import FORMAT_VERSION
from swsc_core.compressed.entry import Entry
from swsc_core.hf.checkpoint_checks import CheckpointHeaders, require_unwrapped, require_valid_parts
from swsc_core.hf.compress_on_load import compress_loaded
from swsc_core.hf.config import SwscConfig
from swsc_core.hf.dense_layers import embeddings_of
from swsc_core.hf.experts import experts_implementations, fuse_experts
from swsc_core.hf.layer_replacement import make_dense
from swsc_core.hf.load_plan import LoadPlan, LoadRequest, make_load_plan
from swsc_core.hf.restore_on_load import restore_conversions
from swsc_core.hf.weight_names import saved_name, without_merges
from swsc_core.layers.linear import CompressedWeight, SwscJoined


class SwscQuantizer(HfQuantizer):
    """Quantization method "swsc" of transformers.

    Its hooks run in this order: `update_attn_implementation`, `_process_model_before_weight_loading`,
    `update_weight_conversions`, `_process_model_after_weight_loading`.
    """

    requires_calibration = False
    quantization_config: SwscConfig

    def __init__(self, quantization_config: SwscConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._requested_experts: dict[str, str | None] = {}
        # None unless a compressed checkpoint is being loaded or was loaded
        self._plan: LoadPlan | None = None
        self._model_conversions: list[Any] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Note the requested experts implementation; creating the model fills in a default where none is requested."""
        self._requested_experts = experts_implementations(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.pre_quantized:
            location = model.config.name_or_path
            checkpoint = CheckpointHeaders.read(location, checkpoint_files) if checkpoint_files else None
            dtype = dtype or torch.get_default_dtype()
            request = LoadRequest(self.quantization_config, dtype, self._requested_experts)
            self._plan = make_load_plan(model, request, checkpoint)
        elif self.quantization_config.dequantize:
            raise ValueError("SwscConfig: dequantize: this checkpoint is not compressed; open it without SwscConfig")

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """The model's own conversions without those of unfused experts, and with steps that restore tensors."""
        self._model_conversions = list(weight_conversions)
        if self._plan is None:
            return weight_conversions
        conversions = without_merges(weight_conversions, self._plan.unfused)
        return restore_conversions(conversions, self._plan) if self._plan.restored else conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if (model.tp_size or 1) > 1:  # tensor parallel loading has split centroids as if they were rows
            raise ValueError(
                "compressed layers do not support the tp_plan of transformers; serve with vLLM, or `swsc restore` first"
            )
        if self._plan is None:
            compress_loaded(model, self.quantization_config)
        else:
            _convert_dtypes(model, self._plan)
            if self._plan.restored:
                model._weight_conversions = [c for c in self._model_conversions if c.was_used()] or None
        _check_and_freeze(model)
        if any(isinstance(embedding, CompressedWeight) for embedding in embeddings_of(model)):
            model.resize_token_embeddings = _refuse_to_resize
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        requested = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config holds the dtype's name
        changes_dtype = requested is not None and requested != model.dtype
        plan = self._plan
        new_dtype = requested or (plan.dtype if plan else torch.float32)
        make_dense(model, new_dtype)
        if plan and plan.unfused:
            fuse_experts(model, new_dtype)
            model.config._experts_implementation = dict(plan.experts_implementations)
            model._weight_conversions = [
                c for c in self._model_conversions if c.was_used() or not without_merges([c], plan.unfused)
            ]
        vars(model).pop("resize_token_embeddings", None)
        # the layers that were not compressed need the same dtype
        return model.to(requested) if changes_dtype else model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Update the model's config before the model is saved: entries under the names that are written."""
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, CompressedWeight)}
        if not getattr(model, "_hf_peft_config_loaded", False):
            require_unwrapped(layers)
        tied = model.all_tied_weights_keys
        self.quantization_config.tensors = {
            saved_name(model, f"{path}.weight"): _saved_entry(model, path, layer)
            for path, layer in layers.items()
            if f"{path}.weight" not in tied
        }
        model.config.quantization_config = self.quantization_config
        return None, {"swsc_format_version": str(FORMAT_VERSION)}

    def is_serializable(self) -> bool:
        """Compressed layers are saved as they are stored."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through compressed layers, so adapters on them can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the forward pass."""
        return True


def _convert_dtypes(model: Any, plan: LoadPlan) -> None:
    """Convert tensors to the model's dtype: transformers 5.19 leaves renamed tensors in the dtype of the file."""
    # parameters that the model keeps in float32 for any requested dtype
    float32_patterns = list(model._get_dtype_plan(plan.dtype))
    float32_names = build_glob_alternation(float32_patterns)[0] if float32_patterns else None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = plan.parameter_dtypes.get(name, tensor.dtype)
        if tensor.dtype != dtype and not (float32_names and float32_names.search(name)):
            tensor.data = tensor.data.to(dtype)


def _check_and_freeze(model: Any) -> None:
    """Check the stored values of compressed layers, and disable gradients of their parts.

    transformers enables gradients of all floating point parameters. Biases keep theirs, as in a dense layer.

    Raises:
        ValueError: a layer holds invalid values.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, CompressedWeight):
            require_valid_parts(path, layer)
        if isinstance(layer, CompressedWeight | SwscJoined):
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "bias":
                    parameter.requires_grad_(False)


def _saved_entry(model: Any, path: str, layer: CompressedWeight) -> Entry:
    """The entry of a layer; the entry of a piece of a fused tensor names the tensor as it is saved."""
    location = layer.entry.location
    if location.tensor is None:
        return layer.entry
    tensor = saved_name(model, f"{path.rpartition('.')[0]}.weight")
    return replace(layer.entry, location=replace(location, tensor=tensor))


def _refuse_to_resize(*_: Any, **__: Any) -> None:
    """Replacement of `resize_token_embeddings`, which would resize the embedding and then fail at a compressed head."""
    raise ValueError("compressed embeddings cannot be resized; call dequantize() first, then resize them")
