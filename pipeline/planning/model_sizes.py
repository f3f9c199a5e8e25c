"""Sizes of a model that determine the memory of its activations."""

from dataclasses import dataclass

from pipeline.architectures.model_config import ModelConfig, find_number


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in a config; 0 where it does not give one.

    Attributes:
        layers: number of decoder layers.
        width: values of a hidden state.
        inner: values between the matrices of a feed-forward layer, or of the experts that a token passes.
        vocabulary: number of tokens.
        heads: number of attention heads.
        expert_stack: weights of the largest parameter that stacks the experts of a layer; 0 without experts.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    heads: int
    expert_stack: int

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSizes":
        """Read the sizes of a config."""
        layers, width, inner, vocabulary, heads, experts, active, expert = (
            find_number(config, key) or 0
            for key in (
                "num_hidden_layers",
                "hidden_size",
                "intermediate_size",
                "vocab_size",
                "num_attention_heads",
                "num_local_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
            )
        )
        experts = experts or find_number(config, "n_routed_experts") or 0
        expert = expert or inner
        inner = max(inner or 4 * width, (active + 1) * expert if experts else 0)
        return cls(layers, width, inner, vocabulary, heads, experts * 2 * expert * width)

    def forward(self, tokens: int) -> int:
        """Values of the activations of one layer in a forward pass."""
        return tokens * (8 * self.width + 4 * self.inner)

    def backward(self, tokens: int) -> int:
        """Values of the activations of all layers that a backward pass needs."""
        return tokens * self.layers * (10 * self.width + 4 * self.inner)

    def attention(self, seqlen: int) -> int:
        """Values of the attention weights of all layers, which only the deterministic kernel of GPUs keeps."""
        return self.layers * self.heads * seqlen**2
