"""YAML of somebody else, or of a slip of the hand, with bounds: a few hundred bytes of it can stand for more than any memory holds.

What is counted is what a document stands for, with every alias in the place of what it means, before anything is made of it.
"""

from typing import Any

import yaml

_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BYTES, _DEPTH, _NODES = (
    1 << 20,
    50,
    200_000,
)  # of a document: the longest front matters of the Hub have a tenth of that
_SLOW_BYTES = 1 << 16  # of a document that PyYAML's own parser is given
_LONGEST = 100  # characters of a number, a date or a truth value
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"


def compose(text: str) -> yaml.Node | None:
    """The document as a tree of nodes, of which nothing is made yet; None if it is empty.

    Raises:
        ValueError: not YAML, or more than the bounds allow.
    """
    if len(text) > _BYTES:
        raise ValueError(f"{len(text):,} characters, at most {_BYTES:,} are read")
    try:
        node = _composed(text, _FAST)
    except yaml.YAMLError as error:  # libyaml refuses some escapes that PyYAML takes
        if _FAST is yaml.SafeLoader or len(text) > _SLOW_BYTES:
            raise ValueError(str(error)) from None
        try:
            node = _composed(text, yaml.SafeLoader)
        except yaml.YAMLError as other:
            raise ValueError(str(other)) from None
    if node is not None and _count(node, {}) > _NODES:
        raise ValueError(f"stands for more than {_NODES:,} values")
    return node


def load(text: str, unique: bool = False) -> Any:
    """What the document says, as `yaml.safe_load`; ValueError as `compose`, and for a key that stands twice if all are to be `unique`."""
    node = compose(text)
    if unique and node is not None:
        _require_unique_keys(node)
    try:
        return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (LookupError, AttributeError, ArithmeticError) as error:  # of "!!int ''", "!!bool x", "!!timestamp x"
        raise ValueError(f"a value that its tag does not fit ({type(error).__name__}: {error})") from None


def _require_unique_keys(node: yaml.Node) -> None:
    """Raise ValueError for a mapping in which a key stands twice: PyYAML would take the last and say nothing."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    seen: dict[str, int] = {}
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ValueError(f"{key.value} stands twice, in lines {seen[key.value]} and {line}")
            seen[key.value] = line
        _require_unique_keys(value)


def _composed(text: str, loader: Any) -> yaml.Node | None:
    """The nodes; ValueError for collections inside each other without end, before anything recurses into them."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")
    node: yaml.Node | None = yaml.compose(text, Loader=loader)
    return node


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of nodes that one stands for, aliases as what they mean; `known`: those that were counted, None: being counted."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ValueError("a value contains itself")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > _LONGEST:
        raise ValueError(f"{node.value[:20]}…: a number of more than {_LONGEST} digits")
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
    total = 1 + sum(_count(child, known) for child in flat)
    known[id(node)] = total
    return total
