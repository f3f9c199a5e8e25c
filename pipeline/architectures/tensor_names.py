"""The layer and the kind of a tensor, from its name."""

import re

_LAYER = re.compile(r"\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Return the first number in the name; None if there is none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def layer_of(name: str) -> str:
    """Return the name up to its first number, which identifies the layer; the whole name if there is no number."""
    match = _LAYER.search(name)
    return name[: match.end() - 1] if match else name


def tensor_kind(name: str) -> str:
    """Return the name with N for each number, equal for tensors that differ in layer or expert only."""
    return re.sub(r"[0-9]+", "N", name)
