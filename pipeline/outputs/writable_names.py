"""Names in a checkpoint that could not be written to an output; refused before any work."""

import json
import os
from collections.abc import Iterable

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, OutputError
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.store import Store, is_inside

# Limits of file systems.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095
# Bytes that a name has in addition while its file is being written.
_TEMPORARY_BYTES = len(".12345678") + len(TEMPORARY_SUFFIX)
# Bytes of the longest name of swsc itself: a record in .swsc/done.
_LONGEST_OWN_NAME = 80


def require_writable_names(source: Checkpoint, output: Store) -> None:
    """Check that all names and values of the source can be written to `output`.

    Raises:
        CheckpointError: a file name, a tensor name, or text in config.json cannot be written.
        OutputError: the path of the output is too long.
    """
    for name in source.extras:
        _require_printable(f"{source.store.root}: the file name {name!r}", name, is_inside(name))
        _require_short(source.store.root, name)
    for name in source.tensors:
        _require_printable(f"{source.store.root}: the tensor name {name!r}", name, bool(name))
    if not _is_utf8(json.dumps(source.config, ensure_ascii=False)):
        raise CheckpointError(
            f"{source.store.root}/config.json: contains an unpaired surrogate (\\ud800 to \\udfff); remove it"
        )
    _require_short_path(output, source.extras)


def _require_short(root: str, name: str) -> None:
    limit = _MAX_NAME_BYTES - _TEMPORARY_BYTES
    if (longest := max(len(os.fsencode(part)) for part in name.split("/"))) > limit:
        raise CheckpointError(
            f"{root}: the file name {name[:40]!r}… has {longest} bytes, more than the limit of {limit}; rename the"
            " file, or move it away"
        )


def _require_short_path(output: Store, names: Iterable[str]) -> None:
    longest = max([_LONGEST_OWN_NAME, *(len(os.fsencode(name)) + _TEMPORARY_BYTES for name in names)])
    if output.is_local and len(os.fsencode(output.root)) + 1 + longest > _MAX_PATH_BYTES:
        raise OutputError(f"{output.root}: the path is too long for the files in it; choose a shorter one")


def _require_printable(subject: str, name: str, is_valid: bool) -> None:
    has_control = any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    if not (is_valid and _is_utf8(name)) or has_control:
        raise CheckpointError(
            f"{subject} cannot be written: not UTF-8, or with control characters or \\ in it; rename it, or move it"
            " away"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
