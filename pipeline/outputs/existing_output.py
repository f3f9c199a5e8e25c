"""What lies in a directory that is to be written: nothing, another output, this one whole, damaged or begun.

Only what is known to be ours is ever removed, and a file counts as finished only if its record names this very run and its bytes
are those of the record.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.errors import OutputError, UnusableOutput, UserError
from pipeline.outputs.owned_files import (
    FINISHING,
    REPORT,
    WRITTEN,
    clear,
    clear_unfinished,
    owned,
    read_list,
    require_no_others,
    require_no_rivals,
)  # fmt: skip
from pipeline.storage.cache_key import ARITHMETIC, identity_changes, run_digest
from pipeline.storage.lease import is_free
from pipeline.storage.paths import require_directory
from pipeline.storage.records import (
    CompressionReportRecord,
    FinishedFileRecord,
    ManifestRecord,
    Record,
    ReportRecord,
    read_record,
)
from pipeline.storage.store import FileRecord, Store

_REPLACED = ".swsc/replaced.json"  # names of files of an output that this one replaces
_REPLACE = "make the output again by --overwrite"
_SHOWN = 200  # characters of a value in an error
_HASHING = 8  # files at a time

Finished = dict[str, tuple[FileRecord, list[dict[str, Any]]]]  # by name of the file: its record, and rows of the report


def require_replaceable(
    store: Store, identity: Mapping[str, Any], overwrite: bool, names: Iterable[str] = ()
) -> None:  # fmt: skip
    """Raise OutputError if the directory is not ours, or is another output and must not be replaced.

    Args:
        identity: without `calibration` if that is not known yet.
        names: of the files that will be written; one that is there and is none of the output's is not replaced.
    """
    require_directory(store)
    _require_no_links(store)
    if not (store.exists(MANIFEST) or store.exists(RUN)) and store.entries().keys() - {".swsc", "lost+found"}:
        raise UnusableOutput(
            f"{store.root}: not empty and not an output of this tool", "choose an empty or new directory"
        )
    if not overwrite and store.exists(MANIFEST):
        _same_settings(store, _read_own(store, MANIFEST, "identity")["identity"], identity)
    elif not overwrite and store.exists(RUN):
        _same(store, _read_own(store, RUN), identity)
    require_no_others(store, names)
    require_no_rivals(store)


def _require_no_links(store: Store) -> None:
    """Raise OutputError if a folder of our own is a link: it leads to where others' files are."""
    if found := next((name for name in (".swsc", FINISHED_FOLDER, ADAPTER_FOLDER) if store.is_link(name)), None):
        raise OutputError(f"{store.root}/{found}: a link, which no output of this tool has; take it away")


def is_finished(store: Store, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the directory is complete and whole; raises OutputError if it is complete, but another output or damaged."""
    if not store.exists(MANIFEST):
        return False
    require_no_rivals(store)
    try:
        manifest = _read_own(store, MANIFEST, kind=ManifestRecord)
        _same_settings(store, manifest["identity"], identity)
        _require_whole(
            store, manifest["files"], ReportRecord if "restored_from" in identity else CompressionReportRecord
        )
    except UserError:  # another output, a damaged one, or one whose manifest names what is outside
        if overwrite:
            return False
        raise
    if is_free(store):
        store.remove(".swsc")  # a run that was cut off right after its manifest leaves it
    return True


def what_is_finished(store: Store, identity: dict[str, Any], overwrite: bool, names: Iterable[str] = ()) -> Finished:
    """What is finished of a run of this identity; a new one is begun, in the place of another one if that is meant.

    `names`: of the files that it will write, which are its own from now on.
    """
    if store.exists(RUN) and not store.exists(MANIFEST) and _is_same_run(store, identity, overwrite):
        _clear_replaced(store)
        _note_written(store, [*read_list(store, WRITTEN), *names])
        return _finished(store, run_digest(_read_own(store, RUN)))
    before = owned(store) if store.exists(RUN) or store.exists(MANIFEST) else set()
    if before:
        store.write_json(_REPLACED, sorted(before))  # first: it is cleared once the run is of the new identity
    _note_written(store, [*before, *names])
    store.write_json(RUN, identity)
    store.remove(MANIFEST)
    _clear_replaced(store)
    return {}


def begun_identity(store: Store, identity: dict[str, Any]) -> dict[str, Any]:
    """The identity that the run under way was begun with, which compares equal to `identity`, on this run's arithmetic.

    Records of finished files name the digest of that very identity.
    """
    return {**_read_own(store, RUN), **{key: identity[key] for key in ARITHMETIC if key in identity}}


def _is_same_run(store: Store, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run under way is of this identity; raises OutputError if it is not and must not be replaced."""
    try:
        _same(store, _read_own(store, RUN), identity)
    except OutputError:
        if overwrite:
            return False
        raise
    return True


def _note_written(store: Store, names: Iterable[str]) -> None:
    """Write down which files are the output's own, unless that is there already."""
    wanted = sorted(set(names))
    if wanted != read_list(store, WRITTEN):
        store.write_json(WRITTEN, wanted)


def _clear_replaced(store: Store) -> None:
    """Remove what an output that is being replaced has left, files and records."""
    if not store.exists(_REPLACED):
        return
    replaced = read_list(store, _REPLACED)
    clear_unfinished(store, replaced)
    clear(store, replaced)
    store.remove(FINISHED_FOLDER)
    store.remove(FINISHING)
    store.remove(_REPLACED)


def _read_own(store: Store, name: str, *keys: str, kind: type[Record] = Record) -> dict[str, Any]:
    """A file of ours, of which `keys` hold objects; OutputError if it is damaged."""
    try:
        value = read_record(store, name, kind)
        return {**value, **{key: dict(value[key]) for key in keys}}
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableOutput(f"{store.root}: {name} is damaged ({error})", _REPLACE) from None


def _same(store: Store, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError unless settings and arithmetic are the same; of what an earlier version began, the latter is not known."""
    _same_settings(store, before, now)
    changed = [
        f"{key} {_shown(before[key])} -> {_shown(now[key])}"
        for key in ARITHMETIC
        if key in before and key in now and before[key] != now[key]
    ]
    if changed:
        raise UnusableOutput(
            f"{store.root}: was begun with other arithmetic ({'; '.join(changed)}), and would hold bytes of two kinds",
            "go on as it was begun (--gpus-per-worker 0 calculates on CPUs), choose another directory, or replace it by --overwrite",
        )


def _same_settings(store: Store, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError unless the settings are the same. What is finished may have been calculated anywhere."""
    changed = [
        f"{key[:_SHOWN]} {_shown(old)} -> {_shown(new)}" for key, (old, new) in identity_changes(before, now).items()
    ]
    if changed:
        raise UnusableOutput(
            f"{store.root}: holds an output of other settings ({'; '.join(changed)})",
            "choose another directory, or replace it by --overwrite",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _require_whole(store: Store, files: Mapping[str, Any], report: type[Record]) -> None:
    """Raise OutputError that names a file which is not as it was written."""
    try:
        with ThreadPoolExecutor(_HASHING) as pool:
            found = [
                line for lines in pool.map(lambda one: file_differences(store, *one), files.items()) for line in lines
            ]
        _read_own(store, REPORT, kind=report)
    except FileNotFoundError:
        found = [f"{REPORT} is missing"]
    if found:
        raise UnusableOutput(f"{store.root}: {found[0]}", _REPLACE)


def _finished(store: Store, run: str) -> Finished:
    """Files of an interrupted `run` that are as their records say; what else it has written of tensors is removed."""
    finished = {}
    for entry in store.below(FINISHED_FOLDER).names():
        file = entry.removesuffix(".json")
        try:
            done = read_record(store, f"{FINISHED_FOLDER}/{entry}", FinishedFileRecord)
            record = FileRecord(file, done["size"], done["sha256"], done.get("tensors", {}))
            sound = done["run"] == run and not file_differences(store, file, record.to_json())
        except ValueError:
            sound = False
        if sound:
            finished[file] = (record, done["rows"])
    written = read_list(store, WRITTEN)
    clear_unfinished(store, written)
    clear(store, {name for name in written if name.endswith(".safetensors")} - finished.keys())
    return finished
