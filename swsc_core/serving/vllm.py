"""vLLM's door: `vllm serve DIR` opens a compressed model once this package is installed (entry point vllm.general_plugins)."""

from typing import Any

from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from swsc_core.serving.config import ServedConfig
from swsc_core.serving.methods import ServedEmbeddingMethod, ServedMethod
from swsc_core.serving.vllm_experts import SwscExpertsMethod
from swsc_core.serving.weight_loader import CheckpointTensor


class SwscLinearMethod(ServedMethod, LinearMethodBase):
    """A linear layer of which at least one tensor is compressed."""

    def ranks_of(self, layer: nn.Module) -> tuple[int, int]:
        return layer.tp_rank, layer.tp_size  # type: ignore[return-value]


class SwscEmbeddingMethod(ServedEmbeddingMethod, LinearMethodBase):
    """A compressed embedding or head."""


class DenseHeadMethod(UnquantizedEmbeddingMethod):
    """A head that is not compressed; tied to an embedding that is, it is the embedding."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        if isinstance(embed_tokens.quant_method, SwscEmbeddingMethod):
            return embed_tokens
        return super().tie_weights(layer, embed_tokens)


class SwscConfig(ServedConfig, QuantizationConfig):
    """`quantization_config` of a compressed model."""

    linear, embedding, head = LinearBase, VocabParallelEmbedding, ParallelLMHead
    linear_method, embedding_method = SwscLinearMethod, SwscEmbeddingMethod
    dense_linear_method, dense_head_method = UnquantizedLinearMethod, DenseHeadMethod

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """That of any layer, and of experts."""
        if isinstance(layer, RoutedExperts) and self.inside(prefix):
            return SwscExpertsMethod(layer, self, prefix)
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, SwscLinearMethod):
            _require_left_alone(method.sources[0].name)
        return method

    def source(self, name: str) -> CheckpointTensor:
        """By vLLM's name, or without what its GPT-2 puts before the names of the hub's checkpoints as it loads them."""
        short = name.removeprefix("transformer.")
        return super().source(name if f"{name}.weight" in self.compressed or short == name else short)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the checkpoint become those of the engine's modules."""
        self.rename(hf_to_vllm_mapper)


def _require_left_alone(name: str) -> None:
    """Raise ValueError for a layer whose tensors vLLM changes before it hands them over."""
    if name.endswith("query_key_value") and get_current_vllm_config().model_config.hf_config.model_type == "bloom":
        raise ValueError(
            f"{name}: vLLM's BLOOM reorders the rows of whatever is called query_key_value, its compressed parts, too;"
            " `swsc restore` first, or compress without --projectors q,k,v"
        )


def register() -> None:
    """Make the format known; vLLM calls this in each of its processes."""
    register_quantization_config("swsc")(SwscConfig)
