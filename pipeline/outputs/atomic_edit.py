"""One text file of a finished output replaced, together with what the manifest says of it.

Two files cannot change at once, so both are noted whole first, in one file, and written from there: whoever comes next completes what
was cut off. A file that does not fit the manifest is damage, here as everywhere, and is not written over.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.tensor_io import file_differences
from pipeline.errors import DamageError, OutputError
from pipeline.outputs.model_card import CARD
from pipeline.outputs.owned_files import clear_unfinished, has_unfinished
from pipeline.storage.lease import LEASE_FILE, acquire_lease, is_free
from pipeline.storage.records import ManifestRecord, check_record, read_record
from pipeline.storage.store import Store

_NOTED = ".swsc/amending.json"  # name of a file -> its new text
_OWN = (
    CARD,
    MANIFEST,
    _NOTED,
    LEASE_FILE,
)  # what is written here, beside which a killed writer leaves an unfinished file


def require_amendable(store: Store, name: str) -> None:
    """Raise if `amend` would.

    Raises:
        OutputError: no finished output, or one that has no such file. DamageError: the file is not as it was written.
    """
    if not store.exists(_NOTED):
        _checked(store, name)


def amend(store: Store, name: str, change: Callable[[str], str], on_wait: Callable[[str], None] | None = None) -> None:
    """Replace the text of the file `name` by what `change` makes of it.

    Args:
        on_wait: told that another run is at work there, for which we then wait; None: that is refused.

    Raises:
        OutputError, DamageError: as `require_amendable`; OutputError: another run writes there.
    """
    lease = acquire_lease(store, on_wait)
    try:
        _settle(store)
        manifest = _checked(store, name)
        before = bytes(store.read(name)).decode()
        text = change(before)
        if text != before:
            data = text.encode()
            files = manifest["files"] | {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
            lease.ticket.require()
            store.write_json(_NOTED, {name: text, MANIFEST: manifest | {"files": files}})
            _complete(store)
    finally:
        lease.release()
        store.below(".swsc").remove_empty()


def settle(store: Store) -> None:
    """Do what a run that was killed while it amended a finished output had noted, and remove what it had half written.

    Nothing if there is no such thing, if another run is at work there, if nothing can be written there, or if the note is damaged:
    then the files count as they are.
    """
    traces = store.is_local and (".swsc" in store.entries() or has_unfinished(store, _OWN))
    if not traces or not is_free(store):
        return
    with suppress(OutputError, DamageError, OSError):
        lease = acquire_lease(store)
        try:
            _settle(store)
        finally:
            lease.release()
            store.below(".swsc").remove_empty()


def as_amended(store: Store, files: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest lists, but for a file that an amendment has replaced before it was cut off: that is listed as it is noted."""
    try:
        noted, manifest = _noted(store)
    except (FileNotFoundError, DamageError):
        return dict(files)
    found = {name: manifest["files"][name] for name in noted if name in manifest["files"]}
    return {**files, **{name: about for name, about in found.items() if not file_differences(store, name, about)}}


def _settle(store: Store) -> None:
    _complete(store)
    clear_unfinished(store, _OWN)


def _complete(store: Store) -> None:
    """Write what is noted; nothing if a run has begun since, which will replace it all."""
    if store.exists(RUN) or not store.exists(_NOTED):
        return
    noted, manifest = _noted(store)
    for name, text in noted.items():
        store.write(name, [text.encode()])
    store.write_json(MANIFEST, manifest)
    store.remove(_NOTED)


def _noted(store: Store) -> tuple[dict[str, str], dict[str, Any]]:
    """Texts by the names of their files, and the manifest that belongs to them; DamageError if it is no such note."""
    try:
        noted = dict(store.read_json(_NOTED))
        manifest = check_record(ManifestRecord, noted.pop(MANIFEST))
        if not all(isinstance(text, str) for text in noted.values()):
            raise ValueError("a file that is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{store.root}: {_NOTED} is damaged ({error}); remove it, then run again") from None
    return noted, manifest


def _checked(store: Store, name: str) -> dict[str, Any]:
    """The manifest, after a look at the file."""
    try:
        manifest = read_record(store, MANIFEST, ManifestRecord)
        about = manifest["files"].get(name)
        found = file_differences(store, name, about) if about else []
    except FileNotFoundError:
        raise OutputError(f"{store.root}: not a finished output of this tool: nothing is written into it") from None
    except ValueError as error:
        raise DamageError(
            f"{store.root}: {MANIFEST} is damaged ({error}); make the output again by --overwrite"
        ) from None
    if not about:
        raise OutputError(f"{store.root}: made without {name}, by an older release; make it again by --overwrite")
    if found:
        raise DamageError(f"{store.root}: {found[0]}: not as it was written; make the output again by --overwrite")
    return manifest
