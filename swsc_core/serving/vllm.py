"""Plug-in of vLLM (entry point vllm.general_plugins): `vllm serve DIR` opens a compressed model."""
# mypy runs without vLLM, whose base classes are Any then
# mypy: allow-subclassing-any

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
    """Method of a linear layer with at least one compressed tensor."""

    def rank_and_size(self, layer: nn.Module) -> tuple[int, int]:
        return layer.tp_rank, layer.tp_size  # type: ignore[return-value]


class SwscEmbeddingMethod(ServedEmbeddingMethod, LinearMethodBase):
    """Method of a compressed embedding or head."""


class DenseHeadMethod(UnquantizedEmbeddingMethod):
    """Method of a head that is not compressed; a head that is tied to a compressed embedding is that embedding."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        if isinstance(embed_tokens.quant_method, SwscEmbeddingMethod):
            return embed_tokens
        tied: nn.Module = super().tie_weights(layer, embed_tokens)
        return tied


class SwscConfig(ServedConfig, QuantizationConfig):
    """`quantization_config` of a compressed model."""

    linear, embedding, head = LinearBase, VocabParallelEmbedding, ParallelLMHead
    linear_method, embedding_method = SwscLinearMethod, SwscEmbeddingMethod
    dense_linear_method, dense_head_method = UnquantizedLinearMethod, DenseHeadMethod

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of any layer, those of experts included."""
        if isinstance(layer, RoutedExperts) and self.compressed_names(prefix):
            return SwscExpertsMethod(layer, self, prefix)
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, SwscLinearMethod):
            _require_unchanged_by_vllm(method.sources[0].name)
        return method

    def checkpoint_tensor(self, name: str) -> CheckpointTensor:
        """The tensor by vLLM's name, or by that name without the prefix that vLLM's GPT-2 adds to names of the Hub."""
        short = name.removeprefix("transformer.")
        return super().checkpoint_tensor(name if f"{name}.weight" in self.compressed or short == name else short)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the tensors of the checkpoint to vLLM's module names."""
        self.rename_tensors(hf_to_vllm_mapper)


def _require_unchanged_by_vllm(name: str) -> None:
    """Raise ValueError for a layer whose stored tensors vLLM changes before the plug-in receives them."""
    if name.endswith("query_key_value") and get_current_vllm_config().model_config.hf_config.model_type == "bloom":
        raise ValueError(
            f"{name}: vLLM's BLOOM reorders the rows of every tensor named query_key_value, compressed parts included;"
            " `swsc restore` first, or compress without --projectors q,k,v"
        )


def register() -> None:
    """Register the format; vLLM calls this in each of its processes."""
    register_quantization_config("swsc")(SwscConfig)
