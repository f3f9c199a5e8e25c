"""Layers that have to be dense: something is done with them beside calling them, which stored parts cannot stand in for.

Mamba multiplies with `dt_proj.weight` itself, routers convert theirs to float32, a hook may change an output, and two modules may
hold one parameter. Such a layer is restored while it is loaded. Reading `weight.device` is harmless, and so is `weight.dtype`
unless what is stored under that name are packed bytes.
"""

import ast
import operator
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from swsc_core.hf.source_reads import Chain, Use, uses_of

# attributes that compressed layers have, too, with the same meaning
_SAME = {
    "()",
    "forward",
    "__call__",
    "bias",
    "in_features",
    "out_features",
    "num_embeddings",
    "embedding_dim",
    "training",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_COMPARISONS: dict[type, Any] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip

_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


class DenseLayers:
    """Says of the layers of one model, which may still be empty, which of them have to be dense."""

    def __init__(self, model: Any) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._paths: dict[int, list[str]] = defaultdict(list)
        self._owners: dict[int, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            self._paths[id(module)].append(path)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._owners[id(parameter)].append(name)
        # transformers pads or cuts the bias of what it ties to the rows of its weight, whatever is stored under that name
        self._tied = {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", ())}
        self._embeddings = {
            f"<{getter}>": id(layer) for getter, layer in zip(_EMBEDDINGS, embeddings_of(model), strict=True)
        }

    def reason(self, path: str, floats: bool, tied: frozenset[str] = frozenset()) -> str | None:
        """Why the layer at `path` has to be dense; None if it may be a compressed one.

        Args:
            floats: what is stored as its weight are floating point values of the model's dtype.
            tied: names of parameters that are known to be tied to its weight, itself among them.
        """
        layer = self._modules[path]
        if "forward" in vars(layer) or any(vars(layer)[hooks] for hooks in _HOOKS):
            return f"{path} has hooks"
        if {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
            return f"{path} has further parameters"
        if path in self._tied and getattr(layer, "bias", None) is not None:
            return f"{path} is tied and has a bias"
        names = {name for parameter in layer.parameters(recurse=False) for name in self._owners[id(parameter)]}
        if others := sorted(names - tied - {f"{path}.weight", f"{path}.bias"}):
            return f"{path} shares its parameters with {others[0]}"
        readers = (self._reader(own, id(layer), floats) for own in self._paths[id(layer)])
        return next((reader for reader in readers if reader), None)

    def _reader(self, path: str, layer: int, floats: bool) -> str | None:
        names = path.split(".")
        for depth in range(len(names)):
            parent = self._modules[".".join(names[:depth])]
            kind: Any = type(parent)
            uses = _uses_of_child(kind, tuple("*" if name.isdigit() else name for name in names[depth:]), floats)
            if uses is None or "forward" in vars(parent):
                return f"the code of {type(parent).__name__} is not there to be read"
            for use in uses:
                ours = self._embeddings.get(use.chain[0], layer) == layer
                if ours and not any(_holds(test, parent) is (not outcome) for test, outcome in use.guards):
                    return f"{type(parent).__name__} reads {'.'.join(use.chain[1:-1])}"
        return None


def embeddings_of(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding of a model and its output head; None where it has none, or its class does not say which."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    return embedding, model.get_output_embeddings()


@cache
def _uses_of_child(kind: type, path: Chain, floats: bool) -> tuple[Use, ...] | None:
    """Uses of the layer at `path` below a module of this class that its stored parts do not serve; None without source."""
    uses = uses_of(kind)
    return (
        None if uses is None else tuple(use for use in uses if any(_harms(t, floats) for t in _tails(use.chain, path)))
    )


def _tails(chain: Chain, path: Chain) -> Iterator[Chain]:
    """What follows the layer at `path` in a chain that may lead to it."""
    root, *names = chain
    if root.startswith("<"):
        yield tuple(names)
    elif root == "self" and len(names) > len(path) and _same(names, path):
        yield tuple(names[len(path) :])
    elif root == "?" and "weight" in names[1:]:  # an object of unknown origin: known by the last of its names
        end = names.index("weight", 1)
        if end <= len(path) and _same(names[:end], path[-end:]):
            yield tuple(names[end:])


def _same(names: Any, path: Chain) -> bool:
    return all(name in ("*", own) for name, own in zip(names, path, strict=False))


def _harms(tail: Chain, floats: bool) -> bool:
    if tail[0] == "weight" and tail[1] in ("device", "dtype", "is_floating_point"):
        return tail[1] != "device" and not floats
    if tail[0] == "parameters":  # the dtype of the first one, as a rule
        return not floats
    return tail[0] not in _SAME


def _holds(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on settings comes to, `self.config.pretraining_tp > 1` say; None if it cannot be told."""
    if isinstance(test, ast.BoolOp):
        found = [_holds(value, module) for value in test.values]
        decided = isinstance(test.op, ast.Or)
        return decided if decided in found else (None if None in found else not decided)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _holds(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
        values = [_number(test.left, module), _number(test.comparators[0], module)]
        return None if None in values else bool(_COMPARISONS[type(test.ops[0])](*values))
    return None


def _number(node: ast.expr, module: nn.Module) -> int | float | None:
    """A number in the source, or an attribute of the module (`self.a`) or its config (`self.config.a`)."""
    value: Any = node.value if isinstance(node, ast.Constant) else None
    names = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
    if names and names[0] == "self":
        value = module
        for name in names[1:]:
            value = getattr(value, name, None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
