"""Numbers of a config.json by which a model is built: no more than can be built, before transformers builds it.

A model without weights is made in milliseconds a layer, but a head of 10**12 values has a table of frequencies for which memory is
asked, and a list of 10**9 experts is built for ever. Real models are orders of magnitude below these bounds.
"""

import re
from collections.abc import Iterator

from pipeline.architectures.model_config import ModelConfig
from pipeline.errors import CheckpointError

_BOUNDS = (
    (re.compile(r"(layers?|blocks?|block_count|depths?|stages)$"), 10_000),
    (re.compile(r"experts"), 1 << 16),
    (re.compile(r"heads?(_count)?$"), 1 << 20),
    (re.compile(r"(dims?|sizes?|rank|width|channels|groups|embd|inner|length|count)$"), 1 << 24),
)
# How long a text may be is no size of anything that is built, nor is what a training has noted of itself.
_FREE = re.compile(
    r"(^general\.|max_|context|positions|window|chunk|seq_?len|sequence|total_|train|dataset|corpus|tokens?_count|param|batch"
    r"|buffer|shuffle)"
)
_DEEP = 20  # objects inside each other


def require_buildable(where: str, config: ModelConfig) -> None:
    """Raise CheckpointError that names a number of a config, or of the header of a GGUF file, which no model has.

    Args:
        where: the file.
    """
    for key, value in _numbers(config, 0):
        if _FREE.search(key):
            continue
        most = next((most for pattern, most in _BOUNDS if pattern.search(key)), None)
        if most is not None and value > most:
            raise CheckpointError(
                f"{where}: {key} is {value if value < 1 << 64 else 'more than 2**64'}, at most {most:,} are built; repair it"
            )


def _numbers(config: ModelConfig, depth: int) -> Iterator[tuple[str, int | float]]:
    """Key -> number, of a config and of the configs in it; of a list each number by the list's key."""
    for key, value in config.items():
        if key == "quantization_config" or not isinstance(key, str):
            continue
        if isinstance(value, dict) and depth < _DEEP:
            yield from _numbers(value, depth + 1)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield key, one
