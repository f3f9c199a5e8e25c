"""vLLM's door for the experts of a mixture: its own unquantized kernels, and a loader before its own that restores W of each."""

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

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what loggers below its own say
KINDS = {"w13": ("w1", "w3"), "w2": ("w2",)}  # parameter -> what vLLM calls the matrices in it


class SwscExpertsMethod(UnquantizedFusedMoEMethod):
    """Of a layer of experts some of which are compressed in the checkpoint: dense in memory, which is said once."""

    def __init__(self, layer: RoutedExperts, config: ServedConfig, prefix: str) -> None:
        super().__init__(layer.moe_config)
        names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        matrices = {}
        for expert in range(layer.moe_config.num_logical_experts):
            for kind, name in names.items():
                source = config.source(f"{prefix}.{expert}.{name}")
                if source.compressed and layer._map_global_expert_id_to_local_expert_id(expert) != -1:
                    matrices[expert, kind] = (source.name, source.entries[""])
        self.experts = RestoredExperts(matrices)
        logger.warning_once(
            "swsc: %s are restored while they load and lie dense in memory; vLLM's kernels for experts take nothing else",
            re.sub(r"\d+", "*", prefix),
        )

    @property
    def supports_eplb(self) -> bool:
        return False  # whose loader does not say of which expert of the checkpoint a tensor is

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """vLLM's own parameters, and empty ones under the names of the other parts, which `RestoredExperts` takes."""
        super().create_weights(layer, *args, **kwargs)
        for stem, kinds in KINDS.items():
            dense = getattr(layer, f"{stem}_weight")
            dense.weight_loader = self._loader(layer, stem, "weight")
            for part in self.experts.parts(*kinds) - {"weight"}:
                empty = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                empty.weight_loader = self._loader(layer, stem, part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stem}_{part}", empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """ValueError, naming what has not come."""
        self.experts.require_all()
        for stem, kinds in KINDS.items():
            for part in self.experts.parts(*kinds) - {"weight"}:
                delattr(layer, f"{stem}_{part}")
        super().process_weights_after_loading(layer)

    def _loader(self, layer: nn.Module, stem: str, part: str) -> Callable[..., bool]:
        def load(
            param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
            return_success: bool = False,
        ) -> bool:  # fmt: skip
            if layer._map_global_expert_id_to_local_expert_id(expert_id) == -1:  # type: ignore[operator]
                return False
            whole = self.experts.take((expert_id, shard_id), part, loaded_weight)
            if whole is None:
                return True
            dense = getattr(layer, f"{stem}_weight")
            return layer.weight_loader(dense, whole, f"{stem}_weight", shard_id, expert_id, True)  # type: ignore[operator]

        return load
