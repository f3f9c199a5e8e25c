"""Digests of the files of a folder, and the differences between two recordings.

Values that change from run to run or with the wording of the program are not recorded, only their keys: seconds, argv,
versions, memory, reasons, the identity of an output, model cards (*.md).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swsc_core.storage.json_fields import JsonValue

_VOLATILE = {"argv", "versions", "peak_rss", "phases", "reason", "identity", "left_out", "kernels", "stages"}
_MEMORY = ("of_which_on_a_gpu", "_peak_bytes")
# JSON files that contain volatile values.
_PARSED = {"swsc_manifest.json", "swsc_report.json"}

# File or part of an output -> its digest, or the stable part of its JSON.
Digests = dict[str, JsonValue]


def digests_of(folder: Path) -> Digests:
    """For every file of a folder its sha256, or the stable part of its JSON."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): _digest(folder / name) for name in names}


def _digest(path: Path) -> Any:
    if path.suffix == ".md":
        return "card"
    if path.name in _PARSED:
        return stable(json.loads(path.read_text(encoding="utf-8")))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable(value: Any, key: str = "") -> Any:
    """A JSON value in which every volatile value is replaced by the name of its type."""
    if key in _VOLATILE or key.endswith(("seconds", ".md", *_MEMORY)):
        return f"<{type(value).__name__}>"
    if isinstance(value, dict):
        return {name: stable(entry, name) for name, entry in value.items()}
    return [stable(entry) for entry in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """One line for every difference of two recordings; floats are compared to the last bit."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in before.keys() | after.keys():
            path = f"{place} · {name}" if place else name
            if name not in after or name not in before:
                yield f"{path}: {'missing' if name not in after else 'new'}"
            else:
                yield from differences(before[name], after[name], path)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{place} · {_label(old, number)}")
    elif type(before) is not type(after) or repr(before) != repr(after):
        yield f"{place}: {_short(before)} → {_short(after)}"


def _label(entry: Any, number: int) -> str:
    return str(entry["name"]) if isinstance(entry, dict) and "name" in entry else str(number)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
