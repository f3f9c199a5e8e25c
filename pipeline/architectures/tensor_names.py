"""What the name of a tensor says: the layer that it belongs to, and its kind, which layers have in common."""

import re

_LAYER = re.compile(r"\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """The first number in the name; None if there is none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: everything up to the first number in its name, or the name itself."""
    match = _LAYER.search(name)
    return name[: match.end() - 1] if match else name


def tensor_kind(name: str) -> str:
    """The name with N in place of each number: equal for tensors whose names differ in numbers alone (layer, expert, w1)."""
    return re.sub(r"[0-9]+", "N", name)
