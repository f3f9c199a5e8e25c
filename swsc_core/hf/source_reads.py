"""What the code of a module class does with the layers below it, read from its source: calls them, or reads their attributes.

A chain is the way to what is used, from the module: `self.mixer.proj.weight.T` is ("self", "mixer", "proj", "weight", "T").
"*" stands for any name (`self.layers[i]`), "?" at the start for an object of unknown origin, "()" at the end for a call, "=" for a
value that is handed on to where it is not followed. Names are followed through assignments, loops, and functions and methods
that are called by name.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

Chain = tuple[str, ...]
Environment = Mapping[str, frozenset[Chain]]
_SETUP = (  # methods that run before weights are there, or that change a model, and are no part of a forward pass
    "__init__", "_init", "init_", "reset_", "_reset", "tie_", "_tie", "get_", "set_", "resize", "_resize", "prune", "_prune",
    "load_", "_load", "save_", "_save", "from_", "convert_", "extra_repr", "freeze", "_freeze",
)  # fmt: skip
_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")
_LOOKS = {"isinstance", "hasattr", "callable", "len", "type", "id", "bool", "repr", "str"}
_LOOPS = {"enumerate", "zip", "list", "tuple", "reversed", "iter"}
_DEPTH = 4  # functions that are followed into each other
_UNKNOWN = frozenset({("?",)})
_FOLLOWED = ("→",)  # handed to a function that is read as well


@dataclass(frozen=True)
class Use:
    """One use of what lies at `chain`, and the conditions under which it is reached: (test, outcome), tests by names of `self`."""

    chain: Chain
    guards: tuple[tuple[ast.expr, bool], ...] = ()


@cache
def uses_of(kind: type) -> tuple[Use, ...] | None:
    """All uses in the methods of a class and its bases, but those of the libraries' own base classes; None without source."""
    found: dict[tuple[Chain, tuple[str, ...]], Use] = {}
    for base in kind.__mro__:
        if _is_library(base):
            continue
        methods = _methods(base)
        if methods is None:
            return None
        reader = _Reader(sys.modules.get(base.__module__), _methods_of_all(kind))
        for method in methods:
            if not method.name.startswith(_SETUP):
                static = any(_name(decorator) == "staticmethod" for decorator in method.decorator_list)
                for use in reader.read(method, [] if static else [frozenset({("self",)})]):
                    found.setdefault((use.chain, tuple(ast.dump(test) for test, _ in use.guards)), use)
    return tuple(found.values())


def _is_library(kind: type) -> bool:
    """Whether a class is one that looks at weights of all modules to load, save, tie or resize them, and calculates nothing."""
    path = kind.__module__
    if path.startswith("transformers."):
        return not path.startswith("transformers.models.")
    return kind is object or path in _BASES or path.startswith("swsc_core.")


_BASES = ("torch.nn.modules.module", "torch.nn.modules.container", "typing", "abc")


def _methods_of_all(kind: type) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__:
        if not _is_library(base):
            for method in _methods(base) or ():
                found.setdefault(method.name, method)
    return found


def _methods(kind: type) -> list[ast.FunctionDef] | None:
    """The functions of a class' body; None without source."""
    module = sys.modules.get(kind.__module__)
    classes = _tree(module).get(kind.__name__) if module else None
    try:
        classes = classes or [ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]]
    except (OSError, TypeError, SyntaxError):
        return None
    return [node for own in classes for node in getattr(own, "body", ()) if isinstance(node, ast.FunctionDef)]


@lru_cache(maxsize=256)
def _tree(module: ModuleType) -> dict[str, list[ast.stmt]]:
    """Name -> definitions of classes and functions of a file; a file is parsed once."""
    try:
        parsed = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, list[ast.stmt]] = {}
    for node in ast.walk(parsed):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


class _Reader:
    """Reads functions of one file.

    Args:
        module: the file, where functions that are called by name are looked up.
        methods: those that `self.name(…)` means.
    """

    def __init__(self, module: ModuleType | None, methods: Mapping[str, ast.FunctionDef], depth: int = 0) -> None:
        self._module, self._methods, self._depth = module, methods, depth

    def read(self, function: ast.FunctionDef, arguments: list[frozenset[Chain]]) -> Iterator[Use]:
        """Uses in `function`, whose first parameters are bound to `arguments`."""
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        environment = dict(zip(names, arguments, strict=False))
        parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        for _ in range(2):  # a name may be used above the line, in a loop, that binds it
            environment = _bound(function, environment)
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                yield from self._followed(node, environment)
            if _is_link(node) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
                yield from self._uses(node, parents, environment)

    def _uses(self, node: Any, parents: Mapping[ast.AST, ast.AST], environment: Environment) -> Iterator[Use]:
        parent = parents[node]
        if _is_link(parent) and getattr(parent, "value", None) is node:
            return  # part of a longer chain
        if isinstance(parent, ast.Call) and _name(parent.func) == "getattr" and parent.args[0] is node:
            return
        end = self._end(node, parents)
        if end is None:
            return
        guards = tuple(_guards(node, parents))
        for chain in _chains(node, environment):
            if end != _FOLLOWED:
                yield Use((*chain, *end), guards)
            elif "weight" in chain[2:]:  # a tensor; modules are followed
                yield Use((*chain, "="), guards)

    def _end(self, node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Chain | None:
        """What happens to a value: None for what cannot matter, or is seen elsewhere."""
        child, parent = node, parents[node]
        while isinstance(parent, ast.IfExp | ast.BoolOp) and getattr(parent, "test", None) is not child:
            child, parent = parent, parents[parent]
        if isinstance(parent, ast.Call) and child is parent.func:
            return ("()",)
        if isinstance(parent, ast.keyword):
            parent = parents[parent]
        if isinstance(parent, ast.Call) and _name(parent.func) in _LOOKS | _LOOPS:
            return None
        if isinstance(parent, ast.Call) and self._callee(parent):
            return _FOLLOWED
        if isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
            return None
        if isinstance(parent, ast.If | ast.While | ast.IfExp | ast.UnaryOp | ast.Expr):
            return None
        if isinstance(parent, ast.Assign | ast.NamedExpr | ast.AnnAssign | ast.For | ast.comprehension):
            return None if _binds_names(parent) else ("=",)
        return ("=",)

    def _callee(self, call: ast.Call) -> tuple[ast.FunctionDef, "_Reader", bool] | None:
        """The function that is called, if it is known: its definition, who reads it, and whether `self` is bound."""
        if self._depth >= _DEPTH:
            return None
        own = call.func
        if isinstance(own, ast.Attribute) and _name(own.value) == "self" and own.attr in self._methods:
            return self._methods[own.attr], _Reader(self._module, self._methods, self._depth + 1), True
        function = getattr(self._module, _name(own) or "", None)
        function = inspect.unwrap(function) if inspect.isfunction(function) else None
        module = sys.modules.get(function.__module__) if function else None
        for found in _tree(module).get(function.__name__, ()) if function and module else ():
            if isinstance(found, ast.FunctionDef):
                return found, _Reader(module, {}, self._depth + 1), False
        return None

    def _followed(self, call: ast.Call, environment: Environment) -> Iterator[Use]:
        """Uses inside of a function that is given something of `self`."""
        given = [_chains(argument, environment) for argument in call.args]
        named = {keyword.arg: _chains(keyword.value, environment) for keyword in call.keywords if keyword.arg}
        if not any(chains - _UNKNOWN for chains in (*given, *named.values())):
            return
        if found := self._callee(call):
            function, reader, bound = found
            names = [own.arg for own in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            arguments = [frozenset({("self",)}), *given] if bound else given
            places = dict(zip(names, arguments, strict=False)) | {
                name: own for name, own in named.items() if name in names
            }
            ordered = [places.get(name, _UNKNOWN) for name in names]
            yield from (Use(use.chain) for use in reader.read(function, ordered) if use.chain[0] != "?")


def _is_link(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Subscript | ast.Name) or _is_getter(node)


def _is_getter(node: ast.AST) -> bool:
    """`getattr(x, …)`, or `x.get_input_embeddings()`."""
    if not isinstance(node, ast.Call):
        return False
    return (_name(node.func) == "getattr" and len(node.args) > 1) or getattr(node.func, "attr", None) in _EMBEDDINGS


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _chains(node: ast.AST, environment: Environment) -> frozenset[Chain]:
    """What an expression may be; nothing for one that is computed."""
    if isinstance(node, ast.Name):
        return environment.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Attribute):
        return frozenset((*chain, node.attr) for chain in _chains(node.value, environment))
    if isinstance(node, ast.Subscript):
        part = () if isinstance(node.slice, ast.Slice) else ("*",)
        return frozenset((*chain, *part) for chain in _chains(node.value, environment))
    if isinstance(node, ast.IfExp):
        return _chains(node.body, environment) | _chains(node.orelse, environment)
    if isinstance(node, ast.BoolOp):
        return frozenset().union(*(_chains(value, environment) for value in node.values))
    if isinstance(node, ast.NamedExpr):
        return _chains(node.value, environment)
    if isinstance(node, ast.Call) and _is_getter(node):
        if isinstance(node.func, ast.Attribute):
            return frozenset({(f"<{node.func.attr}>",)})
        leaf = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
        return frozenset((*chain, str(leaf)) for chain in _chains(node.args[0], environment))
    return frozenset()


def _bound(function: ast.FunctionDef, environment: Environment) -> dict[str, frozenset[Chain]]:
    """`environment` with the names that assignments and loops bind to what is known."""
    found = dict(environment)

    def bind(target: ast.AST, chains: Iterable[Chain]) -> None:
        known = frozenset(chain for chain in chains if chain != ("?",))
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and known:
                found[name.id] = found.get(name.id, frozenset()) | known

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _bind_assigned(target, node.value, found, bind)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            bind(node.target, _chains(node.value, found))
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, ((*chain, "*") for chain in _iterated(node.iter, found) if chain != ("?",)))
    return found


def _bind_assigned(target: ast.AST, value: ast.AST, environment: Environment, bind: Any) -> None:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for own, its in zip(target.elts, value.elts, strict=True):
            _bind_assigned(own, its, environment, bind)
    elif isinstance(target, ast.Name):
        bind(target, _chains(value, environment))


def _iterated(node: ast.AST, environment: Environment) -> frozenset[Chain]:
    if isinstance(node, ast.Call) and _name(node.func) in _LOOPS:
        return frozenset(chain for argument in node.args for chain in _iterated(argument, environment))
    return _chains(node, environment)


def _binds_names(node: Any) -> bool:
    """Whether what is assigned goes to plain names, which are followed."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return all(isinstance(target, ast.Name) for target in targets) or isinstance(node, ast.For | ast.comprehension)


def _guards(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    """Conditions that `node` stands under."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If | ast.IfExp) and node is not parent.test:
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            yield parent.test, node in body
        node = parent
