"""Hypothesis strategies that damage small files: wrong types, huge numbers, deep nesting, missing keys, cut bytes."""

import copy
import json
from typing import Any

import yaml
from hypothesis import settings
from hypothesis import strategies as st

# examples per test in an ordinary run
_FEW = 15


def patient(few: int = _FEW) -> settings:
    """Settings with few examples, unless the profile requests thousands."""
    requested = settings().max_examples
    return settings(max_examples=few if requested <= 100 else requested, suppress_health_check=list(_SLOW))


def _nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _slow() -> tuple[Any, ...]:
    from hypothesis import HealthCheck

    return HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large


_SLOW = _slow()
ODD = st.one_of(
    st.sampled_from(
        [
            None, True, False, -1, 0, 1, 2, 7, 2**31, 2**53 + 1, 2**63, 10**12, 10**30, 10**400, -(10**400), 1.5,
            -0.0, 1e308, 5e-324, float("nan"), float("inf"), "", "x", "..", "../..", "/etc/passwd", "a/b", "\0",
            "\ud800", "\ud83d\ude00", "100", "x" * 5000, "(a+)+$", [], {}, [[]], [None], {"": None}, [1, "a", None],
            {"a": {"b": {}}},
        ]
    ),
    st.text(max_size=8), st.integers(), st.lists(st.integers(-2, 2**62), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3), st.integers(2, 300).map(_nest),
)  # fmt: skip


def _paths(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all nodes of a tree except its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    paths = []
    for key, value in items:
        paths += [(*above, key), *_paths(value, (*above, key))]
    return paths


def _change(draw: Any, tree: Any) -> Any:
    """The tree with one change."""
    paths = _paths(tree)
    if not paths or draw(st.integers(0, 30)) == 0:
        return copy.deepcopy(draw(ODD))
    *above, key = draw(st.sampled_from(paths))
    holder = tree
    for step in above:
        holder = holder[step]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add"]))
    if kind == "drop":
        del holder[key]
    elif kind == "replace":
        holder[key] = copy.deepcopy(draw(ODD))
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(draw(ODD)))
    else:
        holder[draw(st.text(max_size=6))] = holder.pop(key) if kind == "rename" else copy.deepcopy(draw(ODD))
    return tree


@st.composite
def changed_tree(draw: Any, tree: Any) -> Any:
    """A tree with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        tree = _change(draw, tree)
    return tree


# YAML syntax that has no equal in JSON: wrong tags, invalid dates, sets, bytes, aliases, merges, lone surrogates.
_YAML = [
    "!!int ''", "!!float ''", "!!bool x", "!!bool {a: 1}", "!!timestamp x", "!!timestamp ''", "!!null x", "!!int 0b",
    "!!int 1:x", "!!binary x", "!!binary YWJj", "!!set {x, y}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str [1]",
    "!!map x", "!!python/object:os.system x", "!x y", "2024-01-31", "2024-99-99", "2001-12-14t21:59:43.10-99:99",
    "0001-01-01 00:00:00 +23:59", "190:20:30.15", "0x_", "1_000", ".inf", ".nan", "-.inf", "1e999", "=", "<<",
    "{<<: 3}", "{<<: [{a: 1}, {b: 2}]}", "&x [*x]", "[&x a, *x, *x]", "*y", "? [1]", "{? [1] : 2}", "{? {a: 1} : 2}",
    "{null: 1, true: 2, 1.5: 3, 2024-01-31: 4}", '"\\ud800"', '"\\0"', "|\n  x", ">-\n  x", "@x", "`x`", "%x",
    "!!int |\n  7", "!!float 1:x", "09", "~", "yes", "{a: 1, a: 2}", "[", "{", "- x", "\t7", "x: y", "...", "---",
    "--- 1",
]  # fmt: skip


@st.composite
def changed_yaml(draw: Any, tree: dict[str, Any]) -> bytes:
    """A YAML file whose tree or bytes are changed, or in which a value uses unusual YAML syntax."""
    text = yaml.dump(draw(changed_tree(tree)), allow_unicode=True)
    if draw(st.integers(0, 2)) == 0:
        some_keys = {key: value for key, value in tree.items() if draw(st.booleans())}
        text = (
            yaml.dump(some_keys) if some_keys else ""
        ) + f"{draw(st.sampled_from(sorted(tree)))}: {draw(st.sampled_from(_YAML))}\n"
    content = text.encode(errors="surrogatepass")
    return draw(st.one_of(st.just(content), st.just(content), changed_bytes(content)))


@st.composite
def changed_bytes(draw: Any, data: bytes, most: int = 1 << 16) -> bytes:
    """Bytes of which some of the first `most` are set, dropped, inserted or cut off."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), most)))
        kind = draw(st.sampled_from(["set", "insert", "cut", "drop", "wide"]))
        if kind == "set" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=9))
        elif kind == "cut":
            del content[at:]
        elif kind == "wide":
            content[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\0" * 7 + b"\x7f", b"\0" * 5 + b"\1\0\0"]))
        else:
            del content[at : at + draw(st.integers(1, 20))]
    return bytes(content)


@st.composite
def changed_json(draw: Any, data: bytes) -> bytes:
    """A JSON file whose tree or, sometimes, bytes are changed; numbers may have more digits than Python parses."""
    if draw(st.integers(0, 4)) == 0:
        return draw(changed_bytes(data))
    tree = draw(changed_tree(json.loads(data)))
    text = json.dumps(tree, ensure_ascii=True)
    if draw(st.integers(0, 20)) == 0:
        text = draw(st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "1" * 6000, "", "\ufeff" + text, text + text]))
    return text.encode()


@st.composite
def changed_header(draw: Any, data: bytes) -> bytes:
    """A safetensors file with a changed header, whose stated length is mostly right."""
    length = int.from_bytes(data[:8], "little")
    header = draw(changed_json(data[8 : 8 + length]))
    stated_length = draw(
        st.one_of(
            st.just(len(header)),
            st.just(len(header)),
            st.sampled_from([0, 1, max(0, len(header) - 1), len(data), 2**40, 2**64 - 1]),
        )
    )
    return int(stated_length).to_bytes(8, "little") + header + data[8 + length :]
