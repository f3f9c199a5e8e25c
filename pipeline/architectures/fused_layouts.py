"""Row layouts of fused matrices: `count` groups, each of which concatenates so many rows of every part.

Each function here takes a model's (text) config and the number of rows, and returns (count, rows of each part in a group).
"""

from collections.abc import Callable

from pipeline.architectures.model_config import ModelConfig, find_number, number_of

FusedLayout = Callable[[ModelConfig, int], tuple[int, tuple[int, ...]]]


def concatenated(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """All of Q, all of K, all of V (Phi-3, GPT-2)."""
    heads, pairs, width = _heads(config)
    return 1, (heads * width, pairs * width, pairs * width)


def by_head(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """Q, K and V of one head, then of the next (GPT-NeoX, BLOOM)."""
    heads, _, width = _heads(config)
    return heads, (width, width, width)


def by_group(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """The query heads that share a key, their key and value, then the next (InternLM2, Falcon's new decoder)."""
    heads, pairs, width = _heads(config)
    return pairs, (heads // pairs * width, width, width)


def falcon(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """By group in the new decoder (40B), one key for all heads in the old one (7B), or by head (RW)."""
    if config.get("new_decoder_architecture"):
        return by_group(config, rows)
    if config.get("multi_query", True):
        heads, _, width = _heads(config)
        return 1, (heads * width, width, width)
    return by_head(config, rows)


def halves(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """Two parts of equal size, concatenated (gate and up)."""
    return 1, (rows // 2, rows // 2)


def interleaved(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """A row of one, then a row of the other (gate and up of gpt-oss)."""
    return rows // 2, (1, 1)


def latent(config: ModelConfig, rows: int) -> tuple[int, tuple[int, ...]]:
    """What makes K and V of one head from their common latent, then of the next (DeepSeek's MLA)."""
    heads = number_of(config, "num_attention_heads")
    return heads, (number_of(config, "qk_nope_head_dim"), number_of(config, "v_head_dim"))


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and rows of each; ValueError if the config does not say."""
    heads = number_of(config, "num_attention_heads")
    pairs = find_number(config, "num_key_value_heads") or heads
    return heads, pairs, find_number(config, "head_dim") or number_of(config, "hidden_size") // heads
