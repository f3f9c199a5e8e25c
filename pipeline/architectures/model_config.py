"""A model's config.json: its type, the aliases of its keys, and the values that describe the language part.

A multimodal model describes its language part in `text_config`; keys that are missing there are taken from the outer
level. Values are not trusted: a number counts only if it is a positive integer.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

ModelConfig: TypeAlias = Mapping[str, Any]
"""Contents of a model's config.json, or of an object nested in it, as read from JSON; never modified in place.

Its keys belong to transformers and to the model family, so no class of this project lists them. Read numbers with
`find_number` and `number_of`, which know the aliases.
"""

TEXT_CONFIG = "text_config"
# Key that most families use -> other keys for the same number.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    # n_embed occurs in old BLOOM configs.
    "hidden_size": ("n_embed", "n_embd", "d_model"),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_local_experts": ("num_experts", "moe_num_experts"),
}


def text_part(config: ModelConfig) -> ModelConfig:
    """Return the `text_config` of a multimodal model; empty if the model has none."""
    return config.get(TEXT_CONFIG) or {}


def text_config(config: ModelConfig) -> ModelConfig:
    """Return the configuration of the language part: `config`, overridden by its `text_config`."""
    return {**config, **text_part(config)}


def find_number(config: ModelConfig, key: str) -> int | None:
    """Return the positive integer under `key`, or an alias of it, in the language part; None if it is missing."""
    keys = (key, *ALIASES.get(key, ()))
    values = (part.get(name) for part in (text_part(config), config) for name in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def number_of(config: ModelConfig, key: str) -> int:
    """Like `find_number`, but raise ValueError if the number is missing."""
    value = find_number(config, key)
    if value is None:
        raise ValueError(f"config.json does not give {' or '.join((key, *ALIASES.get(key, ())))}")
    return value


def max_positions(config: ModelConfig) -> int | None:
    """Return the longest sequence, in tokens, that the model was trained for; None if the config does not state it."""
    return find_number(config, "max_position_embeddings")
