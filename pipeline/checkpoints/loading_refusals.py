"""Which tensors transformers could not open if they were compressed: its class splits them while loading, or has no place for them."""

import re
from collections.abc import Callable
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError

# name of a tensor, whether it is compressed in pieces -> why it is left out
LoadingRefusal = Callable[[str, bool], str | None]


def loading_refusal(checkpoint: Checkpoint) -> LoadingRefusal:
    """What says of each tensor why it has to stay as it is; of models that transformers has no code for nothing is said."""
    from pipeline.checkpoints.meta_model import UnknownModel, meta_models_of
    from swsc_core.hf.restore_on_load import why_not_restorable
    from swsc_core.hf.weight_names import WeightNames

    try:
        models = [
            one.model for one in meta_models_of(checkpoint.config, checkpoint.store.root, len(checkpoint.tensors))
        ]
    except (UnknownModel, CheckpointError):  # code of its own, or a config that agreement.py refuses
        return lambda *_: None
    names = [WeightNames(model) for model in models]
    idle = _without_place(checkpoint, models[0], names[0])

    def why(tensor: str, joined: bool) -> str | None:
        if tensor in idle:
            return f"{type(models[0]).__name__} of transformers has no place for it"
        return next(filter(None, (why_not_restorable(tensor, joined, own) for own in names)), None)

    return why


def _without_place(checkpoint: Checkpoint, model: Any, names: Any) -> frozenset[str]:
    """Tensors that the class named by config.json has no parameter for, and that it would not pass over either.

    None if the files are of another class.
    """
    own = type(model).__name__ in (checkpoint.config.get("architectures") or [])
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or []]
    found = [name for name in checkpoint.tensors if not names.has_parameter(names.target(name)[0])]
    if not own or "auto_map" in checkpoint.config or 2 * len(found) > len(checkpoint.tensors):
        return frozenset()  # agreement.py says what is wrong
    return frozenset(name for name in found if not any(pattern.search(name) for pattern in ignored))
