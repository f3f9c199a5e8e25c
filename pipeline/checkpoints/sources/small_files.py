"""Local copies of config, tokenizer and other small files of a model, for libraries that need a local directory."""

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path

from pipeline.checkpoints.source import local_copy, open_checkpoint
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store

# Copies of this process, which are removed when it ends.
_copies: list[tempfile.TemporaryDirectory[str]] = []


def small_files(location: str) -> str:
    """Return a local directory with all files of the model at `location` except its weights.

    A local model is not copied.
    """
    store = Store.at(local_copy(location))
    return store.root if store.is_local else _copy(store.root)


def small_files_sha256(location: str) -> str:
    """Return the sha256 of the small files and their names."""
    folder, digest = Path(small_files(location)), hashlib.sha256()
    for name in ("config.json", *open_checkpoint(location).extras):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def forget_small_files() -> None:
    """Make the next call of `small_files` copy them again."""
    _copy.cache_clear()


@lru_cache
def _copy(root: str) -> str:
    checkpoint = open_checkpoint(root)
    folder = tempfile.TemporaryDirectory(prefix="swsc-")
    _copies.append(folder)
    for name in ("config.json", *checkpoint.extras):
        target = Path(folder.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(checkpoint.store.read(name))
    return folder.name


def require_no_custom_code(location: str, error: BaseException) -> None:
    """Raise CheckpointError if an error of transformers states that the model needs custom code."""
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"{location}: the model needs custom code, which is not run by default; read it, then add"
            " --trust-remote-code"
        ) from None
