"""Names in a checkpoint that could not be written again: told of before any work, not after it."""

import json
import os
from collections.abc import Iterable

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, OutputError
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.store import Store, is_inside

_NAME_BYTES, _PATH_BYTES = 255, 4095  # most that file systems take
_WHILE_WRITTEN = len(".12345678") + len(TEMPORARY_SUFFIX)  # bytes that a name is longer by until its file is whole
_OWN = 80  # bytes of the longest name of our own: a record below .swsc/done


def require_writable_names(source: Checkpoint, output: Store) -> None:
    """Raise CheckpointError for a file, tensor or value of the source that cannot be written; OutputError for too long a path."""
    for name in source.extras:
        _require(f"{source.store.root}: the file name {name!r}", name, is_inside(name))
        if (longest := max(map(len, map(os.fsencode, name.split("/"))))) > _NAME_BYTES - _WHILE_WRITTEN:
            raise CheckpointError(
                f"{source.store.root}: the file name {name[:40]!r}… has {longest} bytes, at most"
                f" {_NAME_BYTES - _WHILE_WRITTEN} can be written; rename the file, or move it away"
            )
    _require_names_of_tensors(source.store.root, source.tensors)
    if not _is_utf8(json.dumps(source.config, ensure_ascii=False)):
        raise CheckpointError(
            f"{source.store.root}/config.json: holds half a character (\\ud800 to \\udfff); take it out"
        )
    own = max([_OWN, *(len(os.fsencode(name)) + _WHILE_WRITTEN for name in source.extras)])
    if output.is_local and len(os.fsencode(output.root)) + 1 + own > _PATH_BYTES:
        raise OutputError(f"{output.root}: too long a path for the files in it; choose a shorter one")


def _require_names_of_tensors(root: str, names: Iterable[str]) -> None:
    for name in names:
        _require(f"{root}: the tensor name {name!r}", name, bool(name))


def _require(what: str, name: str, sound: bool) -> None:
    if not (sound and _is_utf8(name) and not any(ord(letter) < 32 or ord(letter) == 127 for letter in name)):
        raise CheckpointError(
            f"{what} cannot be written: not UTF-8, or with control characters or \\ in it; rename it, or move it away"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
