"""Claims about the registry: methods are found by name, and a name belongs to one class."""

from typing import ClassVar

import pytest

from swsc_core.compressed.compressed_rtn import CompressedRtn
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import entry_of, method_named, method_names, part_names, register


class OtherEntry(Entry):
    method: ClassVar[str] = "rtn"


class OtherMethod(CompressedRtn):
    entry_type = OtherEntry  # type: ignore[assignment]


def test_methods_are_found_by_name_and_registering_again_is_harmless() -> None:
    register(CompressedRtn)
    assert method_named("rtn") is CompressedRtn
    assert {"swsc", "rtn"} <= set(method_names())
    assert part_names()[0] == "weight"


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match="rtn"):
        register(OtherMethod)
    assert method_named("rtn") is CompressedRtn


@pytest.mark.parametrize("name", ["gguf", None, 3])
def test_an_unknown_method_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=str(name)):
        method_named(name)
    with pytest.raises(ValueError, match=str(name)):
        entry_of({"method": name, "shape": [1, 1], "dtype": "float32"})
