"""Names that an output cannot contain are refused before any work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError, OutputError
from pipeline.outputs.writable_names import require_writable_names
from pipeline.storage.store import Store


@dataclass
class Source:
    """The part of a checkpoint that the check reads."""

    store: Store
    extras: list[str] = field(default_factory=list)
    tensors: dict[str, None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "names",
    [
        {"extras": ["a\nb"]},
        {"extras": ["../outside"]},
        {"extras": ["x" * 250]},
        {"tensors": {"half\ud800": None}},
        {"tensors": {"": None}},
        {"config": {"key": "\udfff"}},
    ],
    ids=["control character", "outside", "too long", "surrogate", "empty", "value of config.json"],
)
def test_names_that_cannot_be_written(tmp_path: Path, names: dict[str, Any]) -> None:
    store = Store.at(str(tmp_path))
    with pytest.raises(CheckpointError):
        require_writable_names(Source(store, **names), store)  # type: ignore[arg-type]


def test_a_path_that_is_too_long_for_the_files_in_it(tmp_path: Path) -> None:
    source = Source(Store.at(str(tmp_path)), extras=["tokenizer.json"])
    require_writable_names(source, Store.at(str(tmp_path / "out")))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="too long"):
        require_writable_names(source, Store.at("/" + "/".join(["x" * 200] * 20)))  # type: ignore[arg-type]
