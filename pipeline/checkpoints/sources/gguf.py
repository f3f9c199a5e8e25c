"""A GGUF file in, a plain safetensors checkpoint out: llama.cpp's blocks of few bits are dequantized.

transformers knows how the tensors of each architecture are named and permuted in GGUF, so it reads the file. What comes out
has the values that the GGUF file stands for, not those of the model that it was made from; a note in it says so, which
goes on into all that is made of it. A file that is given as a model is dequantized once, into a cache beside it, which whoever
sees the file sees too.
"""

import errno
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.checkpoints.extra_files import CACHED_SIZES
from pipeline.checkpoints.sources.gguf_reader import (
    GgufOrigin,
    load_gguf,
    one_line,
    read_gguf_header,
    require_gguf,
    silence_transformers,
)
from pipeline.console import log
from pipeline.errors import CheckpointError, OutputError, first_line
from pipeline.storage.lease import LEASE_FILE, acquire_lease
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.paths import require_directory
from pipeline.storage.records import GgufOriginRecord, read_record
from pipeline.storage.store import Store, require_free_space

ORIGIN_FILE = "dequantized.json"  # in a checkpoint: the file that it was made of, and what that held
DEFAULT_DTYPE = "bfloat16"  # of a checkpoint, unless another is asked for
_HEAD, _SAMPLES, _SAMPLE_BYTES = 16 << 20, 4096, 4096  # of a file, that tell it from another


def is_gguf(location: str) -> bool:
    """Whether it is the name of a GGUF file, wherever that lies."""
    return location.lower().endswith(".gguf") and not os.path.isdir(location)


def convert_gguf(file: Path, target: str, dtype: str = DEFAULT_DTYPE) -> GgufOrigin:
    """Write the model in `file`, dequantized to `dtype`, and its tokenizer into the new directory `target`.

    The directory appears when it is whole. Two that make the same do it one after the other.

    Raises:
        CheckpointError: no GGUF file, or one that transformers cannot read, or that lacks tensors of the model.
        OutputError: the directory holds something, or there is no room for it.
        ConfigError: the package gguf is missing.
    """
    require_gguf(file)
    require_directory(Store.at(target))
    store = Store(os.path.realpath(Store.at(target).root))  # a link to an empty directory is not replaced by one
    if store.entries():
        raise OutputError(f"{target}: is there already and not empty; give a new directory")
    if os.path.ismount(store.root):
        raise OutputError(
            f"{target}: a mount point, in whose place no finished directory can be put; give a new directory in it: {target}/NAME"
        )
    return _made(file, store, dtype)


def cached_checkpoint(location: str) -> str:
    """Directory of the checkpoint that the GGUF file at `location` stands for: dequantized, if it is not there yet, or damaged.

    Raises:
        CheckpointError: as `convert_gguf`, or the file is not on a disk of this machine. OutputError: no room beside it.
    """
    file, store = _kept(location)
    found = read_gguf_origin(store) if _is_whole(store) else _made(file, store, DEFAULT_DTYPE, kept=True)
    if found:
        warn_dequantized(location, found)
    return store.root


def is_cached(location: str) -> bool:
    """Whether the GGUF file at `location` was dequantized before."""
    return _is_whole(_kept(location)[1])


def read_gguf_origin(store: Store) -> GgufOrigin | None:
    """What the checkpoint in `store` was dequantized from; None if it was not."""
    if not store.exists(ORIGIN_FILE):
        return None
    try:
        note = read_record(store, ORIGIN_FILE, GgufOriginRecord, 1 << 20)
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}/{ORIGIN_FILE}: not as `swsc convert` writes it ({error}); remove it"
        ) from None
    file, baseline, licence = (one_line(note[key]) for key in ("file", "baseline", "licence"))
    return GgufOrigin(file, baseline, licence, note["types"])


def warn_dequantized(location: str, about: GgufOrigin) -> None:
    """Say what figures of a model that was dequantized are figures of; once in a process."""
    if about.baseline:
        _log_once(
            f"note: {location}: figures are those of a dequantized baseline of type {about.baseline}, not of the model that was"
            " quantized"
        )


def _kept(location: str) -> tuple[Path, Store]:
    """A GGUF file, and where its checkpoint is kept, or would be."""
    if "://" in location:
        raise CheckpointError(
            f"{location}: a GGUF file is read from a disk only; copy it to one that all nodes see, and give that"
        )
    file = Path(os.path.abspath(location))
    require_gguf(file)
    return file, Store.at(f"{file.parent}/.swsc-cache/gguf-{_fingerprint(file)[:16]}")


def _fingerprint(file: Path) -> str:
    """Over the head of the file, which has names and vocabulary, and samples so close together that none of its matrices is left out."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {DEFAULT_DTYPE}".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEAD))
        for number in range(_SAMPLES if size > _HEAD else 0):
            opened.seek(_HEAD + (size - _HEAD) * number // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _is_whole(store: Store) -> bool:
    """Whether a checkpoint that is kept is there, with all of its files, as long as they were written."""
    if not store.exists(ORIGIN_FILE):
        return False
    try:
        sizes = (
            dict(store.read_json(CACHED_SIZES)) if store.exists(CACHED_SIZES) else {}
        )  # earlier releases wrote no list
    except ValueError:
        return False
    return all(store.exists(name) and store.size(name) == size for name, size in sizes.items())


def _made(file: Path, store: Store, dtype: str, kept: bool = False) -> GgufOrigin:
    """Write the checkpoint into a folder beside `store`, and put it there when it is whole.

    Whoever writes holds a lease; what one that was killed has left is made anew, and so is one that is `kept` and damaged.
    """
    beside = Store(f"{store.root}{TEMPORARY_SUFFIX}")
    if os.path.islink(beside.root) or (beside.entries() and not beside.exists(LEASE_FILE)):
        raise OutputError(
            f"{beside.root}: is there, and not of an unfinished conversion; move it, or give another place"
        )
    try:
        lease = acquire_lease(beside, on_wait=log)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OutputError(
            f"{error.filename}: nothing can be written there; make a checkpoint elsewhere: swsc convert {file} NEW_DIR"
        ) from None
    try:
        if not (_is_whole(store) if kept else store.exists(ORIGIN_FILE)):
            _write(file, beside, dtype)
            if kept:
                _keep(beside.below("whole"), store)
            store.remove_empty()
            os.rename(f"{beside.root}/whole", store.root)
        found = read_gguf_origin(store)
        assert found is not None
        return found
    finally:
        beside.remove("whole")
        lease.release()
        with beside.locked():
            beside.below(".swsc").remove_empty()
            beside.remove_empty()


def _keep(made: Store, store: Store) -> None:
    """List the files of a checkpoint that is to be kept, and remove a damaged one from its place."""
    made.write_json(CACHED_SIZES, {name: made.size(name) for name in made.names()})
    if store.entries():
        log(f"{store.root}: was damaged, and is replaced")
        store.parent.remove(store.name)


def _write(file: Path, beside: Store, dtype: str) -> None:
    """Write the checkpoint into the folder `whole` of `beside`."""
    silence_transformers()
    about, weights = read_gguf_header(file)
    beside.remove("whole")
    require_free_space(beside, weights * (4 if dtype == "float32" else 2))
    log(f"{file}: is dequantized to {dtype}, into {beside.root.removesuffix(TEMPORARY_SUFFIX)}")
    whole = beside.below("whole")
    for part in load_gguf(file, dtype, weights):
        _save(part, whole.root)
    whole.write_json(ORIGIN_FILE, vars(about))
    for name in whole.names():
        with open(f"{whole.root}/{name}", "rb") as written:
            os.fsync(written.fileno())  # or a power cut may leave names without bytes


def _save(part: Any, folder: str) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of safetensors, which has a class of its own for a disk that is full
        reason = first_line(error)
        raise OutputError(
            f"{folder}: cannot be written ({reason}); make room, and run the same command again"
        ) from None


_log_once = lru_cache(log)
