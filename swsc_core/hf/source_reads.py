"""How the methods of a module class use the layers below the module, found by static analysis of the class's source.

A use is described by a chain of names from the module: `self.mixer.proj.weight.T` is ("self", "mixer", "proj",
"weight", "T"). In a chain "*" stands for any name (`self.layers[i]`), "?" at the start for an object of unknown origin,
"()" at the end for a call, and "=" at the end for a value that is passed on to where the analysis does not follow it.
The analysis follows names through assignments, loops, and functions and methods that are called by name.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

Chain = tuple[str, ...]
Environment = Mapping[str, frozenset[Chain]]
# Prefixes of methods that are no part of a forward pass: they run before weights are loaded, or change or save a model.
_INITIALIZATION = ("__init__", "_init", "init_", "reset_", "_reset", "tie_", "_tie", "freeze", "_freeze", "extra_repr")
_MODEL_CHANGES = ("get_", "set_", "resize", "_resize", "prune", "_prune")
_SAVING = ("load_", "_load", "save_", "_save", "from_", "convert_")
_NOT_FORWARD = (*_INITIALIZATION, *_MODEL_CHANGES, *_SAVING)
_EMBEDDING_GETTERS = ("get_input_embeddings", "get_output_embeddings")
# functions that read nothing of a weight
_INSPECTIONS = {"isinstance", "hasattr", "callable", "len", "type", "id", "bool", "repr", "str"}
_ITERATIONS = {"enumerate", "zip", "list", "tuple", "reversed", "iter"}
# how many nested calls are followed
_MAX_DEPTH = 4
_UNKNOWN = frozenset({("?",)})
# marks an argument of a function that is analysed as well
_FOLLOWED = ("→",)
# modules of base classes that handle weights without computing with them
_BASE_MODULES = ("torch.nn.modules.module", "torch.nn.modules.container", "typing", "abc")


@dataclass(frozen=True)
class Use:
    """One use of an object, and the conditions under which it happens.

    Attributes:
        chain: the object and what is done with it.
        guards: (test, outcome) of the enclosing conditions; tests are expressions over `self`.
    """

    chain: Chain
    guards: tuple[tuple[ast.expr, bool], ...] = ()


@cache
def uses_of(module_class: type) -> tuple[Use, ...] | None:
    """All uses in the methods of a class and its bases, except base classes of libraries; None without source code."""
    uses: dict[tuple[Chain, tuple[str, ...]], Use] = {}
    for base in module_class.__mro__:
        if _is_library(base):
            continue
        methods = _methods(base)
        if methods is None:
            return None
        reader = _FunctionReader(sys.modules.get(base.__module__), _all_methods(module_class))
        for method in methods:
            if not method.name.startswith(_NOT_FORWARD):
                is_static = any(_name(decorator) == "staticmethod" for decorator in method.decorator_list)
                for use in reader.read(method, [] if is_static else [frozenset({("self",)})]):
                    uses.setdefault((use.chain, tuple(ast.dump(test) for test, _ in use.guards)), use)
    return tuple(uses.values())


def _is_library(base: type) -> bool:
    """Whether a class accesses weights of all modules to load, save, tie or resize them, and computes nothing."""
    path = base.__module__
    if path.startswith("transformers."):
        return not path.startswith("transformers.models.")
    return base is object or path in _BASE_MODULES or path.startswith("swsc_core.")


def _all_methods(module_class: type) -> dict[str, ast.FunctionDef]:
    """Method name -> the definition that `self.name(…)` calls."""
    definitions: dict[str, ast.FunctionDef] = {}
    for base in module_class.__mro__:
        if not _is_library(base):
            for method in _methods(base) or ():
                definitions.setdefault(method.name, method)
    return definitions


def _methods(module_class: type) -> list[ast.FunctionDef] | None:
    """The functions of a class body; None without source code."""
    module = sys.modules.get(module_class.__module__)
    classes = _definitions(module).get(module_class.__name__) if module else None
    try:
        classes = classes or [ast.parse(textwrap.dedent(inspect.getsource(module_class))).body[0]]
    except (OSError, TypeError, SyntaxError):
        return None
    return [node for body in classes for node in getattr(body, "body", ()) if isinstance(node, ast.FunctionDef)]


@lru_cache(maxsize=256)
def _definitions(module: ModuleType) -> dict[str, list[ast.stmt]]:
    """Name -> definitions of classes and functions in the file of `module`; cached, to parse each file once."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return {}
    definitions: dict[str, list[ast.stmt]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions.setdefault(node.name, []).append(node)
    return definitions


class _FunctionReader:
    """Finds the uses in functions of one file.

    Args:
        module: the file, where functions that are called by name are looked up.
        methods: definitions that `self.name(…)` calls.
        depth: number of calls that lead here.
    """

    def __init__(self, module: ModuleType | None, methods: Mapping[str, ast.FunctionDef], depth: int = 0) -> None:
        self._module, self._methods, self._depth = module, methods, depth

    def read(self, function: ast.FunctionDef, arguments: list[frozenset[Chain]]) -> Iterator[Use]:
        """Uses in `function`, whose first parameters are bound to `arguments`."""
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        environment = dict(zip(names, arguments, strict=False))
        parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        # twice, because a loop may use a name above the line that binds it
        for _ in range(2):
            environment = _bound(function, environment)
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                yield from self._uses_in_callee(node, environment)
            if _is_link(node) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
                yield from self._uses_of_node(node, parents, environment)

    def _uses_of_node(self, node: Any, parents: Mapping[ast.AST, ast.AST], environment: Environment) -> Iterator[Use]:
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
            elif "weight" in chain[2:]:  # a tensor; modules are followed into the function
                yield Use((*chain, "="), guards)

    def _end(self, node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Chain | None:
        """The end of the chain of `node`; None if its use is harmless or found elsewhere."""
        child, parent = node, parents[node]
        while isinstance(parent, ast.IfExp | ast.BoolOp) and getattr(parent, "test", None) is not child:
            child, parent = parent, parents[parent]
        if isinstance(parent, ast.Call) and child is parent.func:
            return ("()",)
        if isinstance(parent, ast.keyword):
            parent = parents[parent]
        if isinstance(parent, ast.Call) and _name(parent.func) in _INSPECTIONS | _ITERATIONS:
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

    def _callee(self, call: ast.Call) -> tuple[ast.FunctionDef, "_FunctionReader", bool] | None:
        """The called function, if it is found: its definition, a reader for its file, and whether `self` is bound."""
        if self._depth >= _MAX_DEPTH:
            return None
        called = call.func
        if isinstance(called, ast.Attribute) and _name(called.value) == "self" and called.attr in self._methods:
            return self._methods[called.attr], _FunctionReader(self._module, self._methods, self._depth + 1), True
        function = getattr(self._module, _name(called) or "", None)
        function = inspect.unwrap(function) if inspect.isfunction(function) else None
        module = sys.modules.get(function.__module__) if function else None
        for definition in _definitions(module).get(function.__name__, ()) if function and module else ():
            if isinstance(definition, ast.FunctionDef):
                return definition, _FunctionReader(module, {}, self._depth + 1), False
        return None

    def _uses_in_callee(self, call: ast.Call, environment: Environment) -> Iterator[Use]:
        """Uses inside a function that receives `self` or something reached from it."""
        positional = [_chains(argument, environment) for argument in call.args]
        named = {keyword.arg: _chains(keyword.value, environment) for keyword in call.keywords if keyword.arg}
        if not any(chains - _UNKNOWN for chains in (*positional, *named.values())):
            return
        if callee := self._callee(call):
            function, reader, is_bound = callee
            parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            names = [parameter.arg for parameter in parameters]
            arguments = [frozenset({("self",)}), *positional] if is_bound else positional
            bound = dict(zip(names, arguments, strict=False))
            bound |= {name: chains for name, chains in named.items() if name in names}
            in_order = [bound.get(name, _UNKNOWN) for name in names]
            yield from (Use(use.chain) for use in reader.read(function, in_order) if use.chain[0] != "?")


def _is_link(node: ast.AST) -> bool:
    """Whether an expression can be an element of a chain."""
    return isinstance(node, ast.Attribute | ast.Subscript | ast.Name) or _is_getter(node)


def _is_getter(node: ast.AST) -> bool:
    """Whether an expression is `getattr(x, …)` or `x.get_input_embeddings()`."""
    if not isinstance(node, ast.Call):
        return False
    is_getattr = _name(node.func) == "getattr" and len(node.args) > 1
    return is_getattr or getattr(node.func, "attr", None) in _EMBEDDING_GETTERS


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _chains(node: ast.AST, environment: Environment) -> frozenset[Chain]:
    """The chains of objects that an expression may evaluate to; empty for a computed value."""
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
    """`environment` with the names that assignments and loops of `function` bind to known objects."""
    bound = dict(environment)

    def bind(target: ast.AST, chains: Iterable[Chain]) -> None:
        known_chains = frozenset(chain for chain in chains if chain != ("?",))
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and known_chains:
                bound[name.id] = bound.get(name.id, frozenset()) | known_chains

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _bind_assigned(target, node.value, bound, bind)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            bind(node.target, _chains(node.value, bound))
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, ((*chain, "*") for chain in _iterated(node.iter, bound) if chain != ("?",)))
    return bound


def _bind_assigned(
    target: ast.AST, value: ast.AST, environment: Environment, bind: Callable[[ast.AST, Iterable[Chain]], None]
) -> None:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for target_element, value_element in zip(target.elts, value.elts, strict=True):
            _bind_assigned(target_element, value_element, environment, bind)
    elif isinstance(target, ast.Name):
        bind(target, _chains(value, environment))


def _iterated(node: ast.AST, environment: Environment) -> frozenset[Chain]:
    """The chains of what a loop iterates over."""
    if isinstance(node, ast.Call) and _name(node.func) in _ITERATIONS:
        return frozenset(chain for argument in node.args for chain in _iterated(argument, environment))
    return _chains(node, environment)


def _binds_names(node: Any) -> bool:
    """Whether an assignment or loop binds plain names, which the analysis follows."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return all(isinstance(target, ast.Name) for target in targets) or isinstance(node, ast.For | ast.comprehension)


def _guards(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    """(test, outcome) of the conditions that enclose `node`."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If | ast.IfExp) and node is not parent.test:
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            yield parent.test, node in body
        node = parent
