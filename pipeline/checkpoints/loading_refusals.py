"""Finds tensors that transformers could not load if they were compressed.

The model's class splits such a tensor while it loads it, or has no parameter for it.
"""

import re
from collections.abc import Callable
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError

# (Name of a tensor, whether it is compressed in pieces) -> reason to leave it uncompressed; None if there is none.
LoadingRefusal = Callable[[str, bool], str | None]


def loading_refusal(checkpoint: Checkpoint) -> LoadingRefusal:
    """Return a function that gives the reason to leave a tensor uncompressed.

    Models that transformers has no code for have no such tensors.
    """
    from pipeline.checkpoints.meta_model import UnknownModel, meta_models_of
    from swsc_core.hf.restore_on_load import why_not_restorable
    from swsc_core.hf.weight_names import WeightNames

    try:
        meta_models = meta_models_of(checkpoint.config, checkpoint.store.root, len(checkpoint.tensors))
    except (UnknownModel, CheckpointError):  # custom code, or a config that agreement.py refuses
        return lambda *_: None
    named_model = meta_models[0].model
    weight_names = [WeightNames(meta.model) for meta in meta_models]
    unused = _without_parameter(checkpoint, named_model, weight_names[0])

    def reason(tensor: str, is_fused: bool) -> str | None:
        if tensor in unused:
            return f"{type(named_model).__name__} of transformers has no parameter for it"
        reasons = (why_not_restorable(tensor, is_fused, names) for names in weight_names)
        return next(filter(None, reasons), None)

    return reason


def _without_parameter(checkpoint: Checkpoint, model: Any, names: Any) -> frozenset[str]:
    """Return the tensors that the class named in config.json has no parameter for and does not ignore.

    The result is empty if the files seem to belong to another class.
    """
    is_named = type(model).__name__ in (checkpoint.config.get("architectures") or [])
    unused = [name for name in checkpoint.tensors if not names.has_parameter(names.target(name)[0])]
    if not is_named or "auto_map" in checkpoint.config or 2 * len(unused) > len(checkpoint.tensors):
        return frozenset()  # agreement.py reports the mismatch
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or []]
    return frozenset(name for name in unused if not any(pattern.search(name) for pattern in ignored))
