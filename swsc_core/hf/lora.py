"""PEFT puts LoRA adapters on compressed layers: `import swsc_core.hf.lora`, then `get_peft_model` as ever.

The import puts a `LoraModel` that knows compressed layers in the place of PEFT's own; configs and adapters stay the stock ones.
Without it PEFT refuses compressed layers by name. An adapter is itself a low-rank part, so merging it is no rounding: it becomes
compensation of a higher rank, where factors are stored as floating point values.
"""

from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge

from swsc_core.layers.experts import SwscExperts
from swsc_core.layers.linear import SwscLinear

_STARTS = (True, False, "gaussian", "orthogonal")  # of A and B, that need no dense weight
_REMEDY = "use it unmerged, or merge it into the model that `swsc restore` writes"


class SwscLoraLinear(Linear):
    """y = (base layer)(x) + scaling · B A dropout(x), for each active adapter; merging adds to the base layer's low-rank part."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.dtype

    @property
    def _base(self) -> SwscLinear:
        found = self.get_base_layer()
        assert isinstance(found, SwscLinear)
        return found

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None: those of PEFT read or change a dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; ValueError for a kind of LoRA, or a start of A and B, that needs the dense weight."""
        if config.init_lora_weights not in _STARTS:
            known = ", ".join(repr(start) for start in _STARTS)
            raise ValueError(
                f"init_lora_weights {config.init_lora_weights!r} wants a dense weight, this layer is compressed; choose {known}"
            )
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise ValueError(f"a compressed layer takes plain LoRA alone ({error}); drop that option") from None
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the base layer's compensation, whose rank grows by theirs.

        Raises:
            ValueError: as `why_no_merge` says, or an adapter is not finite.
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
        if why := self.why_no_merge([name]):
            raise ValueError(f"adapter {name} cannot be merged into a compressed layer: {why}; {_REMEDY}")
        self._base.add_low_rank(left, right)

    def why_no_merge(self, names: list[str]) -> str | None:
        """Why those adapters cannot all be merged into the base layer; None if they can."""
        own = [name for name in names if name in self.lora_A and name not in self.merged_adapters]
        if any(self.lora_bias[name] for name in own):
            return "a low-rank part takes no biases"
        return self._base.low_rank_error(sum(self.r[name] for name in own)) if own else None

    def unmerge(self) -> None:
        """Take the merged adapters out again, to the bit."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._base.drop_low_rank(self.r[name])


class SwscLoraModel(LoraModel):
    """PEFT's LoraModel; for layers that are not compressed it is nothing else."""

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        lora_config._register_custom_module({SwscLinear: SwscLoraLinear})
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]  # PEFT's is static
        """Experts are no modules in a dense model: what is asked for by name there does not mean them here."""
        return not _of_experts(self.model, key) and LoraModel._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        super()._prepare_model(peft_config, model)
        asked = sorted({str(name).rpartition(".")[2] for name in peft_config.target_parameters or ()} & _joined(model))
        if asked:
            raise ValueError(
                f"PEFT takes these targets for {', '.join(asked)} of the experts, which stay compressed and take no adapters; name"
                " attention layers in target_modules, or open the model with SwscConfig(dequantize=True)"
            )
        if str(peft_config.target_modules).lower() == "all-linear":  # PEFT would leave out what is no `nn.Linear`
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _compressed(model)

    def _check_merge_allowed(self) -> None:
        """Before the first layer is merged: a model that is merged in part would be of no use."""
        super()._check_merge_allowed()
        for path, layer in self.model.named_modules():
            if isinstance(layer, SwscLoraLinear) and (why := layer.why_no_merge(layer.active_adapters)):
                raise ValueError(f"{path}: the adapter cannot be merged: {why}; {_REMEDY}")


def _of_experts(model: Any, key: str) -> bool:
    """Whether the module is inside of experts that lie apart."""
    parents = key.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:depth])), SwscExperts) for depth in range(1, len(parents) + 1)
    )


def _joined(model: Any) -> set[str]:
    """Parameters of experts that are not there, as they lie apart."""
    stacks = [module for module in model.modules() if isinstance(module, SwscExperts)]
    return {name for stack in stacks for name in (stack.up, stack.down)}


def _compressed(model: Any) -> set[str]:
    """Names of the compressed layers, without the head, as PEFT has it, and without what is inside an adapter's layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrapped = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, SwscLinear)
        and module is not head
        and module not in wrapped
        and not _of_experts(model, name)
    }


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = SwscLoraModel
