"""Row layouts of fused matrices, as functions of the model's configuration.

A fused matrix consists of groups of rows, and each group concatenates some rows of every piece (Q, K and V; gate and
up). Each function takes the config and the number of rows of the fused matrix, and returns (number of groups, rows of
each piece in a group). It raises ValueError if the config lacks a number.
"""

from collections.abc import Callable

from pipeline.architectures.model_config import ModelConfig, find_number, number_of

FusedLayout = Callable[[ModelConfig, int], tuple[int, tuple[int, ...]]]


def concatenated(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """One group: all of Q, all of K, all of V (Phi-3, GPT-2)."""
    heads, kv_heads, width = _heads(config)
    return 1, (heads * width, kv_heads * width, kv_heads * width)


def by_head(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """One group per head: its Q, K and V (GPT-NeoX, BLOOM)."""
    heads, _, width = _heads(config)
    return heads, (width, width, width)


def by_group(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """One group per key-value head: its query heads, key and value (InternLM2, Falcon's new decoder)."""
    heads, kv_heads, width = _heads(config)
    return kv_heads, (heads // kv_heads * width, width, width)


def falcon(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """By key-value head in the new decoder (40B), one such head in the old decoder (7B), by head otherwise (RW)."""
    if config.get("new_decoder_architecture"):
        return by_group(config, rows)
    if config.get("multi_query", True):
        heads, _, width = _heads(config)
        return 1, (heads * width, width, width)
    return by_head(config, rows)


def halves(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """One group of two pieces of equal size (gate and up)."""
    return 1, (rows // 2, rows // 2)


def interleaved(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """Alternating rows of two pieces (gate and up of gpt-oss)."""
    return rows // 2, (1, 1)


def latent(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """One group per head: its up-projections of K and V from the common latent (DeepSeek's MLA)."""
    heads = number_of(config, "num_attention_heads")
    return heads, (number_of(config, "qk_nope_head_dim"), number_of(config, "v_head_dim"))


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    """Return the number of query heads, of key-value heads, and the rows of each head."""
    heads = number_of(config, "num_attention_heads")
    kv_heads = find_number(config, "num_key_value_heads") or heads
    return heads, kv_heads, find_number(config, "head_dim") or number_of(config, "hidden_size") // heads
