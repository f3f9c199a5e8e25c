"""YAML from untrusted sources, with bounds: a few hundred bytes of it can stand for more values than memory holds.

The bounds apply to the document with every alias replaced by its value. They are checked before any object is
constructed.
"""

from typing import Any

import yaml

_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Bounds of a document. The longest front matters on the Hub have a tenth of these.
_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 50
_MAX_NODES = 200_000
# Longest document that is parsed again by PyYAML's slow parser.
_MAX_SLOW_CHARACTERS = 1 << 16
# Longest number, date or truth value in characters.
_MAX_SCALAR_CHARACTERS = 100
_MERGE_TAG = "tag:yaml.org,2002:merge"
_TEXT_TAG = "tag:yaml.org,2002:str"


def compose(text: str) -> yaml.Node | None:
    """Parse the document into a tree of nodes, without constructing objects; None if it is empty.

    Raises:
        ValueError: the text is not YAML, or exceeds the bounds.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, more than the limit of {_MAX_CHARACTERS:,}")
    node = _compose_with_fallback(text)
    if node is not None and _count_nodes(node, {}) > _MAX_NODES:
        raise ValueError(f"more than {_MAX_NODES:,} values with all aliases replaced")
    return node


def load(text: str, unique: bool = False) -> Any:
    """Construct the document's value, as `yaml.safe_load` does.

    Args:
        unique: refuse mappings that contain a key twice.

    Raises:
        ValueError: as `compose`; a value that does not fit its tag; a repeated key.
    """
    node = compose(text)
    if unique and node is not None:
        _require_unique_keys(node)
    try:
        return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (LookupError, AttributeError, ArithmeticError) as error:  # "!!int ''", "!!bool x", "!!timestamp x"
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from None


def _compose_with_fallback(text: str) -> yaml.Node | None:
    """Compose by libyaml, or by PyYAML's own parser, which accepts some escapes that libyaml refuses."""
    try:
        return _compose(text, _FAST)
    except yaml.YAMLError as error:
        if _FAST is yaml.SafeLoader or len(text) > _MAX_SLOW_CHARACTERS:
            raise ValueError(str(error)) from None
    try:
        return _compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _compose(text: str, loader: Any) -> yaml.Node | None:
    """Compose the nodes; raise ValueError for too deeply nested collections before anything recurses into them."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    node: yaml.Node | None = yaml.compose(text, Loader=loader)
    return node


def _require_unique_keys(node: yaml.Node) -> None:
    """Raise ValueError for a mapping that contains a key twice: PyYAML would silently take the last one."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    line_of: dict[str, int] = {}
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
            line = key.start_mark.line + 1
            if key.value in line_of:
                raise ValueError(f"{key.value} is given twice, in lines {line_of[key.value]} and {line}")
            line_of[key.value] = line
        _require_unique_keys(value)


def _count_nodes(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Number of nodes of a tree with every alias replaced by its value.

    Args:
        counts: id of a node -> its count, or None while it is being counted.
    """
    if id(node) in counts:
        if (count := counts[id(node)]) is None:
            raise ValueError("a value contains itself")
        return count
    counts[id(node)] = None
    if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT_TAG and len(node.value) > _MAX_SCALAR_CHARACTERS:
        raise ValueError(f"{node.value[:20]}…: a number of more than {_MAX_SCALAR_CHARACTERS} digits")
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = [item for child in children for item in (child if isinstance(child, tuple) else (child,))]
    total = 1 + sum(_count_nodes(child, counts) for child in flat)
    counts[id(node)] = total
    return total
