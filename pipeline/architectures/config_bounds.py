"""Upper bounds for the sizes in a config.json, which are checked before transformers builds the model.

A model without weights is built in milliseconds per layer, but a head of 10**12 values allocates a table of
frequencies, and a list of 10**9 experts takes forever. Real models are orders of magnitude below these bounds.
"""

import re
from collections.abc import Iterator

from pipeline.architectures.model_config import ModelConfig
from pipeline.errors import CheckpointError

# Pattern of a key -> largest value.
_BOUNDS = (
    (re.compile(r"(layers?|blocks?|block_count|depths?|stages)$"), 10_000),
    (re.compile(r"experts"), 1 << 16),
    (re.compile(r"heads?(_count)?$"), 1 << 20),
    (re.compile(r"(dims?|sizes?|rank|width|channels|groups|embd|inner|length|count)$"), 1 << 24),
)
# Keys that are not sizes of modules: lengths of texts, and statistics of the training.
_UNBOUNDED = re.compile(
    r"(^general\.|max_|context|positions|window|chunk|seq_?len|sequence|total_|train|dataset|corpus|tokens?_count|param"
    r"|batch|buffer|shuffle)"
)
# Objects inside each other that are checked.
_MAX_DEPTH = 20


def require_buildable(location: str, config: ModelConfig) -> None:
    """Raise CheckpointError for a size that exceeds its bound.

    Args:
        location: path of the file, for the message.
        config: a config.json, or the header of a GGUF file.
    """
    for key, value in _numbers(config, 0):
        if _UNBOUNDED.search(key):
            continue
        bound = next((bound for pattern, bound in _BOUNDS if pattern.search(key)), None)
        if bound is not None and value > bound:
            shown = value if value < 1 << 64 else "more than 2**64"
            raise CheckpointError(f"{location}: {key} is {shown}, the limit is {bound:,}; repair the file")


def _numbers(config: ModelConfig, depth: int) -> Iterator[tuple[str, int | float]]:
    """Yield (key, number) of a config and the objects nested in it; a number in a list has the key of the list."""
    for key, value in config.items():
        if key == "quantization_config" or not isinstance(key, str):
            continue
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _numbers(value, depth + 1)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key, number
