"""Plug-in for LoRA adapters of PEFT on compressed layers: `import swsc_core.hf.lora`, then `get_peft_model` as usual.

The import replaces PEFT's `LoraModel` by a subclass that knows compressed layers; configs and adapter files stay those
of PEFT. Without it PEFT refuses compressed layers by name. An adapter is a low-rank product itself, so merging it
rounds nothing: it increases the rank of the compensation, provided that the factors are stored as floating point
    values.
"""

from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge

from swsc_core.layers.experts import SwscExperts
from swsc_core.layers.linear import SwscLinear

# initializations of A and B that do not need the dense weight
_SUPPORTED_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
_REMEDY = "use it unmerged, or merge it into the model that `swsc restore` writes"


class SwscLoraLinear(Linear):
    """y = base(x) + Σ scaling · B A dropout(x) over active adapters; merging adds to the base layer's low-rank part."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.dtype

    @property
    def _base(self) -> SwscLinear:
        base = self.get_base_layer()
        assert isinstance(base, SwscLinear)
        return base

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Supported variants of LoRA: the plain one only, because PEFT's others read or change a dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: the variant of LoRA or the initialization of A and B needs the dense weight.
        """
        if config.init_lora_weights not in _SUPPORTED_INITIALIZATIONS:
            choices = ", ".join(repr(choice) for choice in _SUPPORTED_INITIALIZATIONS)
            raise ValueError(
                f"init_lora_weights {config.init_lora_weights!r} needs a dense weight, this layer is compressed;"
                f" choose {choices}"
            )
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise ValueError(f"a compressed layer supports plain LoRA only ({error}); remove that option") from None
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer's compensation, whose rank increases by theirs.

        Args:
            safe_merge: refuse adapters that are not finite.
            adapter_names: adapters to merge; all active ones if None.

        Raises:
            ValueError: an adapter cannot be merged, by the conditions of `require_mergeable`, or is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge(name, safe_merge)
                self.merged_adapters.append(name)

    def _merge(self, name: str, safe_merge: bool) -> None:
        right, b = (layers[name].get_parameter("weight").detach() for layers in (self.lora_A, self.lora_B))
        left = self.scaling[name] * b.float().T
        if safe_merge and not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise ValueError(f"adapter {name} holds NaN or Inf; train it again")
        try:
            self.require_mergeable([name])
        except ValueError as error:
            raise ValueError(f"adapter {name} cannot be merged into a compressed layer: {error}; {_REMEDY}") from None
        self._base.add_low_rank(left, right)

    def require_mergeable(self, names: list[str]) -> None:
        """Raise ValueError unless all of the adapters can be merged into the base layer."""
        unmerged = [name for name in names if name in self.lora_A and name not in self.merged_adapters]
        if any(self.lora_bias[name] for name in unmerged):
            raise ValueError("a low-rank part has no bias")
        if unmerged:
            self._base.require_growing_rank(sum(self.r[name] for name in unmerged))

    def unmerge(self) -> None:
        """Undo all merges; the stored values are restored to the bit."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._base.drop_low_rank(self.r[name])


class SwscLoraModel(LoraModel):
    """PEFT's LoraModel that also puts adapters on compressed layers; other layers are handled by PEFT."""

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        lora_config._register_custom_module({SwscLinear: SwscLoraLinear})
        create: Any = LoraModel._create_new_module
        return create(lora_config, adapter_name, target, **kwargs)

    # an instance method, because the check needs the model; PEFT's is static
    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """Exclude the layers inside experts: a dense model has no such modules, so a target's name cannot mean them."""
        return not _is_in_experts(self.model, key) and LoraModel._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        super()._prepare_model(peft_config, model)
        targets = {str(name).rpartition(".")[2] for name in peft_config.target_parameters or ()}
        if refused := sorted(targets & _unfused_parameters(model)):
            raise ValueError(
                f"target_parameters: PEFT resolves these targets to {', '.join(refused)} of the experts, which stay"
                " compressed and take no adapters; name attention layers in target_modules, or open the model with"
                " SwscConfig(dequantize=True)"
            )
        # PEFT selects only `nn.Linear` here
        if str(peft_config.target_modules).lower() == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _compressed_layers(model)

    def _check_merge_allowed(self) -> None:
        """Check all layers before the first one is merged, so that no model is merged in part."""
        check: Any = super()._check_merge_allowed
        check()
        for path, layer in self.model.named_modules():
            if not isinstance(layer, SwscLoraLinear):
                continue
            try:
                layer.require_mergeable(layer.active_adapters)
            except ValueError as error:
                raise ValueError(f"{path}: the adapter cannot be merged: {error}; {_REMEDY}") from None


def _is_in_experts(model: Any, key: str) -> bool:
    """Whether the module `key` is inside unfused experts."""
    parents = key.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:depth])), SwscExperts) for depth in range(1, len(parents) + 1)
    )


def _unfused_parameters(model: Any) -> set[str]:
    """Names of the expert parameters of the dense model that this model lacks, because its experts are unfused."""
    all_experts = [module for module in model.modules() if isinstance(module, SwscExperts)]
    return {name for experts in all_experts for name in (experts.up, experts.down)}


def _compressed_layers(model: Any) -> set[str]:
    """Names of the compressed layers, without the output head, as in PEFT, and without layers already wrapped."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrapped = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, SwscLinear)
        and module is not head
        and module not in wrapped
        and not _is_in_experts(model, name)
    }


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = SwscLoraModel
