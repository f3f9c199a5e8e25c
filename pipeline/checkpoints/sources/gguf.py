"""Converts a GGUF file to a safetensors checkpoint: the quantized blocks of llama.cpp are dequantized.

transformers knows how GGUF names and permutes the tensors of each architecture, so it reads the file. The checkpoint
has the values that the GGUF file represents, not those of the model that was quantized; a record in it states that, and
is copied to every output. A GGUF file that is given as a model is converted once, into a cache beside the file, which
every machine that sees the file sees.
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
from pipeline.storage.lease import LEASE_FILE, Lease, acquire_lease
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.paths import require_directory
from pipeline.storage.records import GgufOriginRecord, parse_record
from pipeline.storage.store import Store, require_free_space

# File in a checkpoint that describes the GGUF file it was converted from.
ORIGIN_FILE = "dequantized.json"
# Default dtype of a converted checkpoint.
DEFAULT_DTYPE = "bfloat16"
# Bytes at the beginning of a file, and number and size of the samples after them, that identify the file.
_HEAD, _SAMPLES, _SAMPLE_BYTES = 16 << 20, 4096, 4096
# Folder of an unfinished conversion, and bytes of an origin file that are read at most.
_WORK_FOLDER, _ORIGIN_LIMIT = "whole", 1 << 20


def is_gguf(location: str) -> bool:
    """Whether a location is the name of a GGUF file. The file need not exist."""
    return location.lower().endswith(".gguf") and not os.path.isdir(location)


def convert_gguf(file: Path, target: str, dtype: str = DEFAULT_DTYPE) -> GgufOrigin:
    """Write the model in `file`, dequantized to `dtype`, and its tokenizer into the new directory `target`.

    The directory appears when it is complete. A second conversion into the same directory waits for the first one.

    Raises:
        CheckpointError: the file is not a GGUF file, transformers cannot read it, or it lacks tensors of the model.
        OutputError: the directory is not empty, or its disk has too little space.
        ConfigError: the package gguf is not installed.
    """
    require_gguf(file)
    require_directory(Store.at(target))
    store = Store(os.path.realpath(Store.at(target).root))  # keeps a link to an empty directory
    if store.entries():
        raise OutputError(f"{target}: the directory is not empty; give a new directory")
    if os.path.ismount(store.root):
        raise OutputError(f"{target}: a mount point cannot be replaced; give a new directory in it: {target}/NAME")
    return _convert(file, store, dtype)


def cached_checkpoint(location: str) -> str:
    """Return the directory of the converted GGUF file at `location`; converts it if the cache lacks it or is damaged.

    Raises:
        CheckpointError: as `convert_gguf`, or the file is not on a disk of this machine.
        OutputError: the disk of the file has too little space.
    """
    file, store = _cache_of(location)
    origin = read_gguf_origin(store) if _is_complete(store) else _convert(file, store, DEFAULT_DTYPE, is_cache=True)
    if origin:
        warn_dequantized(location, origin)
    return store.root


def is_cached(location: str) -> bool:
    """Whether the cache holds the converted GGUF file at `location`."""
    return _is_complete(_cache_of(location)[1])


def read_gguf_origin(store: Store) -> GgufOrigin | None:
    """Return the GGUF file that the checkpoint in `store` was converted from; None if it was not converted."""
    if not store.exists(ORIGIN_FILE):
        return None
    try:
        record = parse_record(GgufOriginRecord, store.read_json(ORIGIN_FILE, _ORIGIN_LIMIT))
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}/{ORIGIN_FILE}: not written by `swsc convert` ({error}); remove it"
        ) from None
    return GgufOrigin(one_line(record.file), one_line(record.baseline), one_line(record.licence), dict(record.types))


def warn_dequantized(location: str, origin: GgufOrigin) -> None:
    """Log once per process that results refer to the dequantized model."""
    if origin.baseline:
        _log_once(
            f"note: {location}: the model was dequantized from type {origin.baseline}; results refer to this baseline,"
            " not to the model that was quantized"
        )


def _cache_of(location: str) -> tuple[Path, Store]:
    """Return a GGUF file, and the directory that caches its checkpoint."""
    if "://" in location:
        raise CheckpointError(
            f"{location}: a GGUF file must be on a disk; copy it to a disk that all nodes see, and give that path"
        )
    file = Path(os.path.abspath(location))
    require_gguf(file)
    return file, Store.at(f"{file.parent}/.swsc-cache/gguf-{_fingerprint(file)[:16]}")


def _fingerprint(file: Path) -> str:
    """Hash the head of the file, with names and vocabulary, and samples so dense that every matrix has one."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {DEFAULT_DTYPE}".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEAD))
        for number in range(_SAMPLES if size > _HEAD else 0):
            opened.seek(_HEAD + (size - _HEAD) * number // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _is_complete(store: Store) -> bool:
    """Whether a cached checkpoint exists and all of its files have the size with which they were written."""
    if not store.exists(ORIGIN_FILE):
        return False
    try:
        sizes = dict(store.read_json(CACHED_SIZES)) if store.exists(CACHED_SIZES) else {}  # earlier releases wrote none
    except ValueError:
        return False
    return all(store.exists(name) and store.size(name) == size for name, size in sizes.items())


def _convert(file: Path, store: Store, dtype: str, is_cache: bool = False) -> GgufOrigin:
    """Write the checkpoint into a working directory beside `store`, and rename it when it is complete.

    A lease protects the working directory. Remains of a killed conversion are replaced, and so is a damaged cache.
    """
    work = Store(f"{store.root}{TEMPORARY_SUFFIX}")
    lease = _acquire_work_directory(work, file)
    try:
        if not (_is_complete(store) if is_cache else store.exists(ORIGIN_FILE)):
            _write_checkpoint(file, work, dtype)
            if is_cache:
                _replace_cache(work.below(_WORK_FOLDER), store)
            store.remove_empty()
            os.rename(f"{work.root}/{_WORK_FOLDER}", store.root)
        origin = read_gguf_origin(store)
        assert origin is not None
        return origin
    finally:
        work.remove(_WORK_FOLDER)
        lease.release()
        with work.locked():
            work.below(".swsc").remove_empty()
            work.remove_empty()


def _acquire_work_directory(work: Store, file: Path) -> Lease:
    """Acquire the lease on a working directory.

    Raises:
        OutputError: the directory has other contents, or cannot be created.
    """
    if os.path.islink(work.root) or (work.entries() and not work.exists(LEASE_FILE)):
        raise OutputError(
            f"{work.root}: exists and is not an unfinished conversion; move it, or give another directory"
        )
    try:
        return acquire_lease(work, on_wait=log)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OutputError(
            f"{error.filename}: cannot be written; convert the file to another directory: swsc convert {file} NEW_DIR"
        ) from None


def _replace_cache(checkpoint: Store, store: Store) -> None:
    """List the sizes of the files of a new checkpoint, and remove a damaged cache."""
    checkpoint.write_json(CACHED_SIZES, {name: checkpoint.size(name) for name in checkpoint.names()})
    if store.entries():
        log(f"{store.root}: the cached checkpoint is damaged and is replaced")
        store.parent.remove(store.name)


def _write_checkpoint(file: Path, work: Store, dtype: str) -> None:
    """Write the checkpoint into the folder `_WORK_FOLDER` of the working directory."""
    silence_transformers()
    origin, weights = read_gguf_header(file)
    work.remove(_WORK_FOLDER)
    require_free_space(work, weights * (4 if dtype == "float32" else 2))
    log(f"{file}: dequantizing to {dtype}, into {work.root.removesuffix(TEMPORARY_SUFFIX)}")
    checkpoint = work.below(_WORK_FOLDER)
    for part in load_gguf(file, dtype, weights):
        _save(part, checkpoint.root)
    checkpoint.write_json(ORIGIN_FILE, vars(origin))
    for name in checkpoint.names():
        with open(f"{checkpoint.root}/{name}", "rb") as written:
            os.fsync(written.fileno())  # otherwise a power failure may leave empty files


def _save(part: Any, folder: str) -> None:
    """Save a model or a tokenizer of transformers."""
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # safetensors has an exception class of its own for a full disk
        reason = first_line(error)
        raise OutputError(
            f"{folder}: cannot be written ({reason}); free some space, and run the same command again"
        ) from None


_log_once = lru_cache(log)
