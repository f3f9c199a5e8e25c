"""Names that model families give to their projections.

`--projectors q,k` selects by role from this table; whatever it does not know is selected by `--include REGEX`.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError

# role -> the module's own name, as Llama, Mistral, Qwen, Gemma, OPT and their kin spell it
ROLES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj|out_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
# what families call the number of positions that a model was made for
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LAYER = re.compile(r"\.(\d+)\.")


def role_patterns(roles: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    """A pattern of tensor names for each role; ConfigError for a role that is not in the table."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ConfigError(
            f"projectors: {', '.join(unknown)} not known; known are {', '.join(ROLES)}; select others by --include REGEX"
        )
    return {role: re.compile(rf"(^|\.)({ROLES[role]})\.weight$") for role in roles}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Number of positions that a model was made for, if its config says."""
    text: Mapping[str, Any] = config.get("text_config") or {}
    found = (about.get(key) for about in (text, config) for key in _POSITIONS)
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: everything up to the first number in its name, or the name itself."""
    found = _LAYER.search(name)
    return name[: found.end() - 1] if found else name
