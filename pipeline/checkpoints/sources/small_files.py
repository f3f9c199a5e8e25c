"""Local copies of a model's small files, for libraries that open directories only: its config and its tokenizer."""

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path

from pipeline.checkpoints.source import local_copy, open_checkpoint
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store

_kept: list[tempfile.TemporaryDirectory[str]] = []  # they go when the process ends


def small_files(location: str) -> str:
    """A local directory with everything of the model at `location` but its weights; itself, if it is local."""
    store = Store.at(local_copy(location))
    return store.root if store.is_local else _copied(store.root)


def small_files_sha256(location: str) -> str:
    """sha256 over these files, their names included."""
    folder, digest = Path(small_files(location)), hashlib.sha256()
    for name in ("config.json", *open_checkpoint(location).extras):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def forget_small_files() -> None:
    """Have them copied again when they are asked for next."""
    _copied.cache_clear()


@lru_cache
def _copied(root: str) -> str:
    checkpoint = open_checkpoint(root)
    folder = tempfile.TemporaryDirectory(prefix="swsc-")
    _kept.append(folder)
    for name in ("config.json", *checkpoint.extras):
        target = Path(folder.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(checkpoint.store.read(name))
    return folder.name


def require_no_custom_code(location: str, error: BaseException) -> None:
    """Raise CheckpointError if what transformers said is that it would have to run code that the model brings."""
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"{location}: needs code of its own, which is not run unasked; read it, then add --trust-remote-code"
        ) from None
