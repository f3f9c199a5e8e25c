"""Atomic edit of one text file of a finished output, together with its entry in the manifest.

Two files cannot change at once. An edit therefore writes both new contents into one note first, and then the files from
the note, so that whoever opens the output next completes an interrupted edit. A file that differs from the manifest is
damaged, as everywhere, and is not overwritten.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.tensor_io import file_differences
from pipeline.errors import DamageError, OutputError
from pipeline.outputs.model_card import CARD
from pipeline.outputs.owned_files import Manifest, ManifestEntry, clear_unfinished, has_unfinished
from pipeline.storage.lease import LEASE_FILE, acquire_lease, is_free
from pipeline.storage.records import ManifestRecord, check_record, read_record
from pipeline.storage.store import Store

# File name -> its new text; MANIFEST -> the new manifest.
_NOTE = ".swsc/amending.json"
# Files that an edit writes: a killed writer leaves temporary files beside them.
_EDITED = (CARD, MANIFEST, _NOTE, LEASE_FILE)


def require_editable(store: Store, name: str) -> None:
    """Raise if `edit_file` would.

    Raises:
        OutputError: the store is not a finished output, or has no such file.
        DamageError: the file is not as it was written.
    """
    if store.exists(_NOTE):
        return
    try:
        _read_manifest(store, name)
    except DamageError:
        # Another run may have begun an edit after the check for its note: then the file is newer than the manifest.
        if not store.exists(_NOTE):
            _read_manifest(store, name)


def edit_file(
    store: Store, name: str, change: Callable[[str], str], on_wait: Callable[[str], None] | None = None
) -> None:
    """Replace the text of the file `name` with the result of `change`.

    Args:
        on_wait: called before waiting for another run that writes there; None: such a run is an error.

    Raises:
        OutputError: as `require_editable`; another run writes there.
        DamageError: as `require_editable`.
    """
    lease = acquire_lease(store, on_wait)
    try:
        _complete(store)
        manifest = _read_manifest(store, name)
        before = bytes(store.read(name)).decode()
        text = change(before)
        if text != before:
            data = text.encode()
            entry: ManifestEntry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            files = {**manifest["files"], name: entry}
            lease.ticket.require()
            store.write_json(_NOTE, {name: text, MANIFEST: {**manifest, "files": files}})
            _write_noted(store)
    finally:
        lease.release()
        store.below(".swsc").remove_empty()


def complete_interrupted_edit(store: Store) -> None:
    """Complete the edit of a finished output that a killed run has begun, and remove its temporary files.

    Does nothing if there is none, if another run writes there, if the directory is read-only, or if the note is
    damaged.
    """
    interrupted = store.is_local and (".swsc" in store.entries() or has_unfinished(store, _EDITED))
    if not interrupted or not is_free(store):
        return
    with suppress(OutputError, DamageError, OSError):
        lease = acquire_lease(store)
        try:
            _complete(store)
        finally:
            lease.release()
            store.below(".swsc").remove_empty()


def with_interrupted_edit(store: Store, files: Mapping[str, ManifestEntry]) -> dict[str, ManifestEntry]:
    """Entries of a manifest, replaced by those of an interrupted edit for files that it has written already."""
    try:
        texts, manifest = _read_note(store)
    except (FileNotFoundError, DamageError):
        return dict(files)
    noted = {name: entry for name, entry in manifest["files"].items() if name in texts}
    return {**files, **{name: entry for name, entry in noted.items() if not file_differences(store, name, entry)}}


def _complete(store: Store) -> None:
    _write_noted(store)
    clear_unfinished(store, _EDITED)


def _write_noted(store: Store) -> None:
    """Write the noted files; nothing if a run has begun since, because it will replace all of them."""
    if store.exists(RUN) or not store.exists(_NOTE):
        return
    texts, manifest = _read_note(store)
    for name, text in texts.items():
        store.write(name, [text.encode()])
    store.write_json(MANIFEST, manifest)
    store.remove(_NOTE)


def _read_note(store: Store) -> tuple[dict[str, str], Manifest]:
    """Return the new texts by file name, and their manifest; raise DamageError if the note is damaged."""
    try:
        texts = dict(store.read_json(_NOTE))
        manifest = cast(Manifest, check_record(ManifestRecord, texts.pop(MANIFEST)))
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("a value is not a text")
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{store.root}: {_NOTE} is damaged ({error}); remove it, then run again") from None
    return texts, manifest


def _read_manifest(store: Store, name: str) -> Manifest:
    """Read the manifest; raise OutputError or DamageError unless the file `name` is as the manifest lists it."""
    try:
        manifest = cast(Manifest, read_record(store, MANIFEST, ManifestRecord))
        entry = manifest["files"].get(name)
        differences = file_differences(store, name, entry) if entry else []
    except FileNotFoundError:
        raise OutputError(
            f"{store.root}: not a finished output of swsc; choose one, or finish this one first"
        ) from None
    except ValueError as error:
        raise DamageError(
            f"{store.root}: {MANIFEST} is damaged ({error}); write the output again with --overwrite"
        ) from None
    if not entry:
        raise OutputError(
            f"{store.root}: written without {name} by an older release; write the output again with --overwrite"
        )
    if differences:
        raise DamageError(f"{store.root}: {differences[0]}; write the output again with --overwrite")
    return manifest
