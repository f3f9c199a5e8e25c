"""What a directory to be written already holds: nothing, another output, or this one: finished, damaged or unfinished.

Only files that belong to an output are ever removed. A file counts as finished only if its record names this very run
and its bytes are those of the record.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.errors import OutputError, UnusableOutput, UserError
from pipeline.outputs.owned_files import (
    FINISHING,
    REPORT,
    WRITTEN,
    ManifestEntry,
    clear,
    clear_unfinished,
    owned,
    read_list,
    require_no_competing_weights,
    require_no_others,
)
from pipeline.outputs.report_rows import JsonRow
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

# List of the files of an output that the present run replaces.
_REPLACED = ".swsc/replaced.json"
_REWRITE = "write the output again with --overwrite"
# Characters of a value that an error shows.
_SHOWN = 200
# Files that are hashed at a time.
_HASHING_THREADS = 8


class FinishedFile(NamedTuple):
    """A file that an earlier run of the same identity completed.

    Attributes:
        rows: report rows of the matrices in it, as JSON.
    """

    record: FileRecord
    rows: Sequence[JsonRow]


FinishedFiles = Mapping[str, FinishedFile]
# Compares files of a store with their records, by name, and returns the differences of each file, one sentence each.
FileCheck = Callable[[Store, Mapping[str, FileRecord]], Mapping[str, list[str]]]


def check_in_threads(store: Store, records: Mapping[str, FileRecord]) -> dict[str, list[str]]:
    """A `FileCheck` that hashes the files in this process."""
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        found = threads.map(lambda item: file_differences(store, item[0], item[1].to_json()), records.items())
        return dict(zip(records, found, strict=True))


def require_replaceable(
    store: Store, identity: Mapping[str, object], overwrite: bool, names: Iterable[str] = ()
) -> None:
    """Raise OutputError if the directory is not an output of swsc, or is another output that must not be replaced.

    Args:
        identity: without the key `calibration` if the calibration is not known yet.
        names: files that will be written; one that exists must belong to the output.
    """
    require_directory(store)
    _require_no_links(store)
    is_output = store.exists(MANIFEST) or store.exists(RUN)
    if not is_output and store.entries().keys() - {".swsc", "lost+found"}:
        raise UnusableOutput(f"{store.root}: not empty and not an output of swsc", "choose an empty or new directory")
    if not overwrite and store.exists(MANIFEST):
        _require_same_settings(store, _read_own(store, MANIFEST, "identity")["identity"], identity)
    elif not overwrite and store.exists(RUN):
        _require_same_run(store, _read_own(store, RUN), identity)
    require_no_others(store, names)
    require_no_competing_weights(store)


def _require_no_links(store: Store) -> None:
    """Raise OutputError if a folder of the output is a link: it would lead to files of somebody else."""
    folders = (".swsc", FINISHED_FOLDER, ADAPTER_FOLDER)
    if link := next((name for name in folders if store.is_link(name)), None):
        raise OutputError(f"{store.root}/{link}: a link, but no output of swsc contains links; remove it")


def is_finished(
    store: Store, identity: Mapping[str, object], overwrite: bool, check: FileCheck = check_in_threads
) -> bool:
    """Whether the directory holds the finished and undamaged output of this identity.

    Args:
        check: hashes its files.

    Raises:
        OutputError: it holds another or a damaged output, and `overwrite` is not set.
    """
    if not store.exists(MANIFEST):
        return False
    require_no_competing_weights(store)
    try:
        manifest = _read_own(store, MANIFEST, kind=ManifestRecord)
        _require_same_settings(store, manifest["identity"], identity)
        report = ReportRecord if "restored_from" in identity else CompressionReportRecord
        _require_undamaged(store, manifest["files"], report, check)
    except UserError:
        if overwrite:
            return False
        raise
    if is_free(store):
        store.remove(".swsc")  # left by a run that was killed right after it wrote the manifest
    return True


def resume_or_start(
    store: Store,
    identity: Mapping[str, object],
    overwrite: bool,
    names: Iterable[str] = (),
    check: FileCheck = check_in_threads,
) -> FinishedFiles:
    """Resume the unfinished run of this identity, or start one, which replaces an existing output.

    Args:
        names: files that the run writes; they belong to the output from now on.
        check: hashes the files that the run has finished.

    Returns:
        The files that the resumed run has finished.
    """
    if store.exists(RUN) and not store.exists(MANIFEST) and _is_same_run(store, identity, overwrite):
        _clear_replaced(store)
        _write_list(store, [*read_list(store, WRITTEN), *names])
        return _finished_files(store, run_digest(_read_own(store, RUN)), check)
    before = owned(store) if store.exists(RUN) or store.exists(MANIFEST) else set()
    if before:
        # This list is written first. Its files are removed once the run record has the new identity.
        store.write_json(_REPLACED, sorted(before))
    _write_list(store, [*before, *names])
    store.write_json(RUN, identity)
    store.remove(MANIFEST)
    _clear_replaced(store)
    return {}


def started_identity(store: Store, identity: Mapping[str, object]) -> Mapping[str, object]:
    """The identity with which the present run was started, with the arithmetic of `identity`.

    It compares equal to `identity`, but may leave out settings with default values. Records of finished files contain
    the digest of the started identity.
    """
    return {**_read_own(store, RUN), **{key: identity[key] for key in ARITHMETIC if key in identity}}


def _is_same_run(store: Store, identity: Mapping[str, object], overwrite: bool) -> bool:
    """Whether the unfinished run has this identity; raise OutputError if it has not and must not be replaced."""
    try:
        _require_same_run(store, _read_own(store, RUN), identity)
    except OutputError:
        if overwrite:
            return False
        raise
    return True


def add_names(store: Store, names: Sequence[str]) -> None:
    """Record that a run will write further files. OutputError: one exists and does not belong to the output."""
    require_no_others(store, names)
    _write_list(store, [*read_list(store, WRITTEN), *names])


def _write_list(store: Store, names: Iterable[str]) -> None:
    """Record which files belong to the output, unless the record is up to date."""
    names = sorted(set(names))
    if names != read_list(store, WRITTEN):
        store.write_json(WRITTEN, names)


def _clear_replaced(store: Store) -> None:
    """Remove files and records of the output that is being replaced."""
    if not store.exists(_REPLACED):
        return
    replaced = read_list(store, _REPLACED)
    clear_unfinished(store, replaced)
    clear(store, replaced)
    store.remove(FINISHED_FOLDER)
    store.remove(FINISHING)
    store.remove(_REPLACED)


def _read_own(store: Store, name: str, *keys: str, kind: type[Record] = Record) -> Any:
    """Read a JSON file of the output in which `keys` hold objects; raise OutputError if it is damaged."""
    try:
        value = read_record(store, name, kind)
        return {**value, **{key: dict(value[key]) for key in keys}}
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableOutput(f"{store.root}: {name} is damaged ({error})", _REWRITE) from None


def _require_same_run(store: Store, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise OutputError unless settings and arithmetic are the same. Earlier releases did not record the arithmetic."""
    _require_same_settings(store, before, now)
    recorded = [key for key in ARITHMETIC if key in before and key in now]
    changed = [f"{key} {_shown(before[key])} -> {_shown(now[key])}" for key in recorded if before[key] != now[key]]
    if changed:
        raise UnusableOutput(
            f"{store.root}: started with other arithmetic ({'; '.join(changed)}), so its bytes would differ",
            "resume with the arithmetic of the start (--gpus-per-worker 0 computes on CPUs), choose another"
            " directory, or replace it with --overwrite",
        )


def _require_same_settings(store: Store, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise OutputError unless the settings are the same. The arithmetic of a finished output may be any."""
    changed = [
        f"{key[:_SHOWN]} {_shown(old)} -> {_shown(new)}" for key, (old, new) in identity_changes(before, now).items()
    ]
    if changed:
        raise UnusableOutput(
            f"{store.root}: holds an output of other settings ({'; '.join(changed)})",
            "choose another directory, or replace it with --overwrite",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _require_undamaged(
    store: Store, files: Mapping[str, ManifestEntry], report: type[Record], check: FileCheck
) -> None:
    """Raise OutputError that names a file which is not as it was written."""
    try:
        results = check(store, {name: FileRecord.from_json(name, entry) for name, entry in files.items()})
        differences = [line for name in files for line in results[name]]
        _read_own(store, REPORT, kind=report)
    except FileNotFoundError:
        differences = [f"{REPORT} is missing"]
    if differences:
        raise UnusableOutput(f"{store.root}: {differences[0]}", _REWRITE)


def _finished_files(store: Store, run: str, check: FileCheck) -> FinishedFiles:
    """Files of the interrupted `run` that are as their records state; its other tensor files are removed."""
    names = [record.removesuffix(".json") for record in store.below(FINISHED_FOLDER).names()]
    recorded = {name: file for name in names if (file := _recorded_file(store, name, run))}
    differences = check(store, {name: file.record for name, file in recorded.items()})
    finished = {name: file for name, file in recorded.items() if not differences[name]}
    written = read_list(store, WRITTEN)
    clear_unfinished(store, written)
    clear(store, {name for name in written if name.endswith(".safetensors")} - finished.keys())
    return finished


def _recorded_file(store: Store, name: str, run: str) -> FinishedFile | None:
    """The record of the file `name`, if it is valid and of this `run`."""
    try:
        data = read_record(store, f"{FINISHED_FOLDER}/{name}.json", FinishedFileRecord)
    except ValueError:
        return None
    if data["run"] != run:
        return None
    return FinishedFile(FileRecord.from_json(name, data), data["rows"])
