"""Detection of layers that have to stay dense, because the model does more with them than call them.

Mamba multiplies with `dt_proj.weight` itself, routers convert their weight to float32, a hook may change an output, and
two modules may share one parameter. Stored parts cannot replace the weight there, so such a layer is restored while it
is loaded. Reading `weight.device` is harmless, and so is `weight.dtype` unless packed bytes are stored under that name.
"""

import ast
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from swsc_core.hf.source_reads import Chain, Use, uses_of

_CALLS = {"()", "forward", "__call__"}
_SIZES = {"in_features", "out_features", "num_embeddings", "embedding_dim"}
# attributes that compressed layers have with the same meaning
_SUPPORTED = _CALLS | _SIZES | {"bias", "training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_EMBEDDING_GETTERS = ("get_input_embeddings", "get_output_embeddings")


class DenseLayers:
    """Decides which layers of one model have to stay dense; the model may be on the meta device."""

    def __init__(self, model: Any) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._paths: dict[int, list[str]] = defaultdict(list)
        self._owners: dict[int, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            self._paths[id(module)].append(path)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._owners[id(parameter)].append(name)
        # transformers pads or cuts the bias of a tied layer to the number of rows of its weight, whatever the weight
        # stores
        self._tied = {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", ())}
        embeddings = zip(_EMBEDDING_GETTERS, embeddings_of(model), strict=True)
        self._embeddings = {f"<{getter}>": id(layer) for getter, layer in embeddings}

    def reason(self, path: str, floats: bool, tied: frozenset[str] = frozenset()) -> str | None:
        """Why the layer at `path` has to stay dense; None if it may be replaced by a compressed layer.

        Args:
            floats: the part that is stored as its weight holds floating point values of the model's dtype.
            tied: names of the parameters that are known to be tied to its weight, its own among them.
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
        reasons = (self._reason_in_parents(alias, id(layer), floats) for alias in self._paths[id(layer)])
        return next((reason for reason in reasons if reason), None)

    def _reason_in_parents(self, path: str, layer_id: int, floats: bool) -> str | None:
        """The first use of the layer's weight in the code of a module above `path`."""
        names = path.split(".")
        for depth in range(len(names)):
            parent = self._modules[".".join(names[:depth])]
            parent_class: Any = type(parent)
            child = tuple("*" if name.isdigit() else name for name in names[depth:])
            uses = _uses_of_child(parent_class, child, floats)
            if uses is None or "forward" in vars(parent):
                return f"the source code of {type(parent).__name__} is not available"
            for use in uses:
                is_this_layer = self._embeddings.get(use.chain[0], layer_id) == layer_id
                is_unreachable = any(_evaluate(test, parent) is (not outcome) for test, outcome in use.guards)
                if is_this_layer and not is_unreachable:
                    return f"{type(parent).__name__} reads {'.'.join(use.chain[1:-1])}"
        return None


def embeddings_of(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head of a model; None where it has none or its class does not define one."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    return embedding, model.get_output_embeddings()


@cache
def _uses_of_child(module_class: type, path: Chain, floats: bool) -> tuple[Use, ...] | None:
    """Uses of the layer at `path` below a module of the class that need its dense weight; None without source code."""
    uses = uses_of(module_class)
    if uses is None:
        return None
    return tuple(use for use in uses if any(_needs_dense(tail, floats) for tail in _tails(use.chain, path)))


def _tails(chain: Chain, path: Chain) -> Iterator[Chain]:
    """What follows the layer at `path` in a chain that may lead to it."""
    root, *names = chain
    if root.startswith("<"):
        yield tuple(names)
    elif root == "self" and len(names) > len(path) and _matches(names, path):
        yield tuple(names[len(path) :])
    elif root == "?" and "weight" in names[1:]:  # an object of unknown origin is recognized by the names after it
        end = names.index("weight", 1)
        if end <= len(path) and _matches(names[:end], path[-end:]):
            yield tuple(names[end:])


def _matches(names: list[str], path: Chain) -> bool:
    return all(name in ("*", child) for name, child in zip(names, path, strict=False))


def _needs_dense(tail: Chain, floats: bool) -> bool:
    """Whether the stored parts of a layer do not serve what `tail` does with the layer."""
    if tail[0] == "weight" and tail[1] in ("device", "dtype", "is_floating_point"):
        return tail[1] != "device" and not floats
    if tail[0] == "parameters":  # code that iterates over parameters usually reads the dtype of the first one
        return not floats
    return tail[0] not in _SUPPORTED


def _evaluate(test: ast.expr, module: nn.Module) -> bool | None:
    """Value of a condition on settings, such as `self.config.pretraining_tp > 1`; None if it is not known."""
    if isinstance(test, ast.BoolOp):
        values = [_evaluate(value, module) for value in test.values]
        deciding = isinstance(test.op, ast.Or)
        return deciding if deciding in values else (None if None in values else not deciding)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        operand = _evaluate(test.operand, module)
        return None if operand is None else not operand
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
        left, right = _number(test.left, module), _number(test.comparators[0], module)
        return None if left is None or right is None else bool(_COMPARISONS[type(test.ops[0])](left, right))
    return None


def _number(node: ast.expr, module: nn.Module) -> int | float | None:
    """A literal number, or a number that is an attribute of the module (`self.a`) or its config (`self.config.a`)."""
    value: Any = node.value if isinstance(node, ast.Constant) else None
    names = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
    if names and names[0] == "self":
        value = module
        for name in names[1:]:
            value = getattr(value, name, None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
