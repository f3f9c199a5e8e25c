"""Plug-in of SGLang (entry point sglang.srt.plugins), written from the source of 0.5.23 and never run in SGLang.

docs/vllm.md states what is tested.
"""
# SGLang has no type information: its base classes are Any to mypy
# mypy: allow-subclassing-any

from collections.abc import Mapping
from typing import Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch import nn

from swsc_core.serving.config import ServedConfig
from swsc_core.serving.methods import ServedEmbeddingMethod, ServedMethod

# layers that SGLang's models fuse; few model classes declare them
_PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class SwscLinearMethod(ServedMethod, LinearMethodBase):
    """Method of a linear layer with at least one compressed tensor."""

    def rank_and_size(self, layer: nn.Module) -> tuple[int, int]:
        group = getattr(layer, "tp_group", None)
        if getattr(layer, "kv_tp_group", group) is not group:
            raise ValueError(f"{self.sources[0].name}: heads split by two groups are not served; `swsc restore` first")
        rank, size = get_group_rank_size(group)
        return rank, size


class SwscEmbeddingMethod(ServedEmbeddingMethod, LinearMethodBase):
    """Method of a compressed embedding or head."""


class SwscConfig(ServedConfig, QuantizationConfig):
    """`quantization_config` of a compressed model."""

    linear, embedding, head = LinearBase, VocabParallelEmbedding, ParallelLMHead
    linear_method, embedding_method = SwscLinearMethod, SwscEmbeddingMethod
    dense_linear_method, dense_head_method = UnquantizedLinearMethod, UnquantizedEmbeddingMethod

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ServedConfig:
        served = super().from_config(config)
        for name, tensor in served.compressed.items():
            if tensor.is_fused or tensor.location.transposed:
                raise ValueError(
                    f"{name}: fused and transposed matrices are not served compressed; `swsc restore` first"
                )
        served.packed_modules_mapping = {**_PACKED_MODULES, **config.get("packed_modules_mapping", {})}
        return served

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Rename the tensors of the checkpoint to SGLang's module names."""
        self.rename_tensors(hf_to_sglang_mapper)


def register() -> None:
    """Register the format; SGLang calls this in each of its processes."""
    quantization.QUANTIZATION_METHODS["swsc"] = SwscConfig
    # SGLang looks methods up here on a CPU with AMX
    quantization.CPU_QUANTIZATION_METHODS["swsc"] = SwscConfig
