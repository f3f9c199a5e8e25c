"""vLLM's door: `vllm serve DIR` opens a compressed model once this package is installed (entry point vllm.general_plugins)."""

from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from swsc_core.serving.methods import ServedConfig, ServedEmbeddingMethod, ServedMethod


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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the checkpoint become those of the engine's modules."""
        self.rename(hf_to_vllm_mapper)


def register() -> None:
    """Make the format known; vLLM calls this in each of its processes."""
    register_quantization_config("swsc")(SwscConfig)
