"""Experts of a mixture in vLLM: its unquantized kernels, behind a loader that restores each expert's matrices."""
# mypy runs without vLLM, whose base classes are Any then
# mypy: allow-subclassing-any

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from swsc_core.serving.config import ServedConfig
from swsc_core.serving.experts import RestoredExperts

# a child of vLLM's own logger, because vLLM prints only what its loggers emit
logger = init_logger(f"vllm.{__name__}")
# vLLM's parameter -> its names of the matrices that the parameter fuses
_PARAMETERS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class SwscExpertsMethod(UnquantizedFusedMoEMethod):
    """Method of experts with compressed matrices in the checkpoint; they are dense in memory, as the log states."""

    def __init__(self, layer: RoutedExperts, config: ServedConfig, prefix: str) -> None:
        super().__init__(layer.moe_config)
        names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        matrices = {}
        for expert in range(layer.moe_config.num_logical_experts):
            for kind, name in names.items():
                source = config.checkpoint_tensor(f"{prefix}.{expert}.{name}")
                if source.compressed and layer._map_global_expert_id_to_local_expert_id(expert) != -1:
                    matrices[expert, kind] = (source.name, source.entries[""])
        self.experts = RestoredExperts(matrices)
        logger.warning_once(
            "swsc: %s are restored while they load and dense in memory; vLLM's expert kernels take dense weights only",
            re.sub(r"\d+", "*", prefix),
        )

    @property
    def supports_eplb(self) -> bool:
        """No: the loader of load balancing does not pass the number that the expert has in the checkpoint."""
        return False

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create vLLM's own parameters, and empty ones under the names of the other parts, for `RestoredExperts`."""
        super().create_weights(layer, *args, **kwargs)
        for stem, kinds in _PARAMETERS.items():
            dense = getattr(layer, f"{stem}_weight")
            dense.weight_loader = self._weight_loader(layer, stem, "weight")
            for part in self.experts.parts(*kinds) - {"weight"}:
                empty = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                empty.weight_loader = self._weight_loader(layer, stem, part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stem}_{part}", empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Remove the empty parameters; ValueError, naming the missing parts, unless all experts are restored."""
        self.experts.require_all()
        for stem, kinds in _PARAMETERS.items():
            for part in self.experts.parts(*kinds) - {"weight"}:
                delattr(layer, f"{stem}_{part}")
        super().process_weights_after_loading(layer)

    def _weight_loader(self, layer: nn.Module, stem: str, part: str) -> Callable[..., bool]:
        """The function that vLLM calls with each stored tensor of a part; vLLM's interface defines its arguments."""

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            engine_layer: Any = layer
            if engine_layer._map_global_expert_id_to_local_expert_id(expert_id) == -1:
                return False
            restored = self.experts.take((expert_id, shard_id), part, loaded_weight)
            if restored is None:
                return True
            name = f"{stem}_weight"
            loaded: bool = engine_layer.weight_loader(getattr(layer, name), restored, name, shard_id, expert_id, True)
            return loaded

        return load
