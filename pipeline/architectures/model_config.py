"""What a model's config.json says: one table of the names that families use, one place that looks into `text_config`.

Values here are those of the language part: a multimodal model describes it in `text_config`, and what is missing there is
taken from the outer level. No value is trusted: a key counts only if its value is a positive integer.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
TEXT = "text_config"
# the name that most families use -> other names of the same number
ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    # n_embed is in old BLOOM configs
    "hidden_size": ("n_embed", "n_embd", "d_model"),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_local_experts": ("num_experts", "moe_num_experts"),
}


def text_part(config: Config) -> Config:
    """The `text_config` of a multimodal model; empty if the model has none."""
    return config.get(TEXT) or {}


def text_config(config: Config) -> dict[str, Any]:
    """All that describes the language part: `config`, overridden by its `text_config`."""
    return {**config, **text_part(config)}


def find_number(config: Config, key: str) -> int | None:
    """A positive integer of the language part, under `key` or an alias of it; None if the config does not give it."""
    keys = (key, *ALIASES.get(key, ()))
    values = (part.get(name) for part in (text_part(config), config) for name in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def number_of(config: Config, key: str) -> int:
    """As `find_number`; ValueError if the config does not give it."""
    value = find_number(config, key)
    if value is None:
        raise ValueError(f"config.json does not give {' or '.join((key, *ALIASES.get(key, ())))}")
    return value


def positions_of(config: Config) -> int | None:
    """Number of positions that a model was made for, if its config says."""
    return find_number(config, "max_position_embeddings")
