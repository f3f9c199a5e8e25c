"""What a checkpoint holds, held against the model that is to take it: what transformers would only warn of, or take as it is.

Headers are held against entries in headers.py; here they are held against the model's own parameters.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from swsc_core.hf.headers import Header
from swsc_core.hf.weight_names import WeightNames
from swsc_core.layers.linear import CompressedWeight


def require_place(model: Any, tensor: str, where: str) -> None:
    """Raise ValueError for a tensor without a place in the model, unless it is a head of another class, or known to be passed over."""
    ignored = model._keys_to_ignore_on_load_unexpected or []
    own = type(model).__name__ in (model.config.architectures or [])
    if own and not any(re.search(pattern, tensor) for pattern in ignored):
        raise ValueError(f"{where}: {tensor} has no place in this model; take the config.json that belongs to it")


def require_all(model: Any, names: WeightNames, stored: Iterable[str], where: str) -> None:
    """Raise ValueError if a parameter is in no file: transformers would warn and go on with whatever lies in memory.

    A class that is not the checkpoint's own brings a head of its own, which is to be trained: what it shares has to be there.
    """
    own = type(model).__name__ in (model.config.architectures or []) or not hasattr(model, model.base_model_prefix)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    filled, tied = names.filled(stored), model.all_tied_weights_keys
    for name in model.state_dict():
        found = name in filled or tied.get(name) in filled or any(k in filled for k, v in tied.items() if v == name)
        wanted = own or name.startswith(f"{model.base_model_prefix}.")
        if wanted and not found and not any(pattern.search(name) for pattern in ignored):
            raise ValueError(f"{where}: nothing is stored for {name}; compress or download it again")


def require_shapes(
    model: Any, names: WeightNames, headers: Mapping[str, Header], restored: Collection[str], where: str
) -> None:
    """Raise ValueError if a tensor has another shape than its parameter, which transformers 5.19 takes as it is.

    Heads of a class of one's own are left to transformers, which may be asked to make them anew.
    """
    state, head = model.state_dict(), model.get_output_embeddings()
    inside = [f"{model.base_model_prefix}."] if hasattr(model, model.base_model_prefix) else [""]
    inside += [f"{path}." for path, layer in model.named_modules() if layer is head]
    for stored, (dtype, shape) in headers.items():
        target, pattern = names.target(stored)
        own = not pattern and target in state and stored not in restored and target.startswith(tuple(inside))
        if own and tuple(state[target].shape) != shape:
            raise ValueError(
                f"{where}: {stored} is {dtype} {list(shape)}, this model wants {list(state[target].shape)};"
                " take the config.json that belongs to it"
            )


def require_labels(path: str, layer: CompressedWeight) -> None:
    """Raise ValueError for stored values that cannot be (labels that name no centroid); a layer on disk is not read for it."""
    if layer.weight.device.type != "meta":
        try:
            layer.matrix.require_valid()
        except ValueError as error:
            raise ValueError(f"{path}: {error}; run `swsc verify`, then compress or download it again") from None


def require_unwrapped(paths: Iterable[str]) -> None:
    """Raise ValueError for layers within those of an adapter that was deleted: under such names nothing opens them again."""
    if wrapped := next((path for path in paths if path.endswith(".base_layer")), None):
        raise ValueError(
            f"{wrapped}: this layer still lies within that of an adapter; open the model again before saving it"
        )
