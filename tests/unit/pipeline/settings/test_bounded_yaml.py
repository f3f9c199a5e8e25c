"""YAML with bounds equals PyYAML, and refuses files that would take all memory or all time."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.settings.bounded_yaml import compose, load
from pipeline.settings.validation import read_config

LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.dates()
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
LAUGHS = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))])


@given(VALUE)
def test_what_is_written_is_read_as_pyyaml_reads_it(value: object) -> None:
    text = yaml.safe_dump(value)
    assert load(text) == yaml.safe_load(text)


def test_aliases_and_merges_mean_what_they_mean() -> None:
    text = "base: &base {bits: 3, seed: 1}\none: {<<: *base, bits: 4}\ntwo: *base\n"
    assert load(text) == {"base": {"bits": 3, "seed": 1}, "one": {"seed": 1, "bits": 4}, "two": {"bits": 3, "seed": 1}}


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS, MERGES, "[" * 5000, "a: " + "{b: " * 5000, "a: &a [*a]", "a: &a {b: *a}", "x" * (1 << 21),
        "1:" * 50_000 + "1", "9" * 5000,
        "a: 2024-99-99", "? [a]\n: 1", "a: !!int ''", "a: !!float ''", "a: !!bool x", "a: !!timestamp x", "--- !!int",
        "!!python/object:os.system x", "a: *b", "\0", "a: b: c", "- " * 60_000,
    ],
)  # fmt: skip
def test_what_would_hurt_is_refused_soon(text: str, tmp_path: Path) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"."):
        load(text)
    assert time.process_time() - started < 2
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")


def test_no_document_is_none() -> None:
    assert compose("") is None
    assert load("# nothing") is None


@pytest.mark.parametrize(
    "value",
    [
        '"\\0"',
        '"\\ud800"',
        "!!binary AAAA",
        "!!set {q, k}",
        "!!pairs [a: 1]",
        '[["a\\0"]]',
        '{"\\0": 1}',
        '{a: ["\\udfff"]}',
    ],
)
def test_what_no_setting_is(value: str, tmp_path: Path) -> None:
    """Text that no path may have, and types of which no setting is."""
    (tmp_path / "config.yaml").write_text(f"projectors: {value}")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")
