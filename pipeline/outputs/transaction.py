"""An output directory: how a run begins, resumes, replaces and commits it.

During a run the directory holds finished tensor files and, below `.swsc`, the identity of the run, its lease, and a
record of each finished file. The other files follow at the end, the manifest last. A directory without a manifest
therefore never counts as a finished output, and an interrupted run can resume. A worker of a run that has lost the
directory is recognized by its ticket, and its files by the run that their records name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint, read_header
from pipeline.checkpoints.weight_files import INDEX, TENSOR_FILE
from pipeline.errors import DISK_FULL_ERRNOS, CheckpointError, DiskFull, OutputError
from pipeline.outputs.atomic_edit import complete_interrupted_edit
from pipeline.outputs.existing_output import (
    FileCheck,
    FinishedFiles,
    add_names,
    check_in_threads,
    is_finished,
    require_replaceable,
    resume_or_start,
    started_identity,
)
from pipeline.outputs.model_card import CARD, SOURCE_CARD
from pipeline.outputs.owned_files import FINISHING, REPORT, WRITTEN, clear, clear_unfinished, read_list
from pipeline.storage.cache_key import full_identity, run_digest
from pipeline.storage.lease import LEASE_FILE, Lease, Ticket, acquire_lease
from pipeline.storage.records import CalibrationRecord, ManifestRecord, read_record
from pipeline.storage.store import FileRecord, Store
from swsc_core.compressed.config_json import FORMAT_VERSION

# Hashes of passages of the calibration text (pipeline/texts/contamination.py).
CALIBRATION = "swsc_calibration.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class OutputRequest:
    """An output that a run is about to write.

    Attributes:
        store: its directory.
        identity: what makes two runs the same: settings and fingerprint of the source.
        names: files that the run writes; no other file is ever replaced or removed.
        overwrite: replace an output of other settings, or a damaged one.
        source: what the output is made from, if that must not be the same directory.
        rewrite: also replace a finished output of the same identity.
        check: hashes the files of earlier runs.
    """

    store: Store
    identity: Mapping[str, object]
    names: Iterable[str] = ()
    overwrite: bool = False
    source: Store | None = None
    rewrite: bool = False
    check: FileCheck = check_in_threads


@dataclass(frozen=True)
class Output:
    """An output directory that this run may write until it leaves the context.

    Attributes:
        identity: as in the request, or as the resumed run has recorded it.
        finished: files that an earlier run of the same identity completed, by name.
        lease: None if the whole output is finished already.
        made_directory: the directory did not exist before.
    """

    store: Store
    identity: Mapping[str, object]
    finished: FinishedFiles
    lease: Lease | None
    made_directory: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.lease:
            self.lease.release()
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            raise DiskFull.from_os_error(error) from None

    @property
    def complete(self) -> bool:
        """Whether the output is finished already, so that nothing is to be written."""
        return self.lease is None

    @property
    def ticket(self) -> Ticket:
        """The proof of ownership that every commit of a file presents."""
        assert self.lease is not None
        return replace(self.lease.ticket, run=run_digest(self.identity))

    def add_names(self, names: Sequence[str]) -> None:
        """Record that this run will write further files. OutputError: one exists and is not of this output."""
        add_names(self.store, names)

    @property
    def finished_bytes(self) -> int:
        """Bytes of the finished files."""
        return sum(file.record.size for file in self.finished.values())


def begin(request: OutputRequest, on_wait: Callable[[str], None] | None = None) -> Output:
    """Open an output directory for a run, or find the files that an earlier run of the same identity finished.

    Args:
        on_wait: called before waiting for another run that writes there; None: such a run is an error.

    Raises:
        OutputError: the directory holds something else, was begun with other settings or from another source, is being
            written by another run, or is the source under another path.
    """
    store = request.store
    request = replace(request, names=list(request.names))
    was_finished = store.exists(MANIFEST)
    if was_finished:
        complete_interrupted_edit(store)
        if not request.rewrite and is_finished(store, request.identity, request.overwrite, request.check):
            return Output(store, request.identity, {}, None)
    require_replaceable(store, request.identity, request.overwrite, request.names)
    made_directory = not store.is_there
    lease = acquire_lease(store, on_wait)
    try:
        return _begin_leased(request, lease, was_finished, made_directory)
    except BaseException:
        lease.release()
        store.below(".swsc").remove_empty()
        if made_directory:
            store.remove_empty()
        raise


def _begin_leased(request: OutputRequest, lease: Lease, was_finished: bool, made_directory: bool) -> Output:
    """Begin an output whose directory is leased, unless another run has finished it while we waited for the lease."""
    store, identity, overwrite = request.store, request.identity, request.overwrite
    if request.source and lease.is_seen_in(request.source):
        raise OutputError(
            f"{store.root}: is the same directory as {request.source.root}, under another path; choose another output"
        )
    if not was_finished and is_finished(store, identity, overwrite, request.check):
        lease.release()
        return Output(store, identity, {}, None)
    finished = resume_or_start(store, identity, overwrite, request.names, request.check)
    return Output(store, started_identity(store, identity), finished, lease, made_directory)


def calibration_hashes(store: Store) -> frozenset[str]:
    """Passage hashes of the texts that the model in `store` was calibrated on; empty without a calibration.

    Raises:
        CheckpointError: the record of the calibration is damaged.
    """
    if not store.exists(CALIBRATION):
        return frozenset()
    try:
        return frozenset(read_record(store, CALIBRATION, CalibrationRecord)["traces"])
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}: {CALIBRATION} is damaged ({error}), so the calibration text is unknown; download the model"
            " again, or compress again"
        ) from None


def abandon(output: Output) -> None:
    """Remove what this run wrote, after a user's mistake that only showed during the run, such as NaN in a weight."""
    if output.finished:
        return
    written = read_list(output.store, WRITTEN)
    clear_unfinished(output.store, written)
    clear(output.store, written)
    _remove_run_files(output)
    if output.made_directory:
        output.store.remove_empty()


def _copied_files(source: Checkpoint) -> dict[str, str]:
    """Files that are copied from the source: name in the output -> name in the source."""
    copied = {name: name for name in source.extras if name != CARD}
    if CARD in source.extras:
        copied.setdefault(SOURCE_CARD, CARD)
    return copied


def changed_since(store: Store, source: Checkpoint) -> list[str]:
    """Files of the source that have changed or appeared since the finished output in `store` copied them.

    The source's card does not count, because the Hub may serve another one with each download.
    """
    try:
        files = read_record(store, MANIFEST, ManifestRecord)["files"]
    except (FileNotFoundError, ValueError):
        return []

    def is_as_copied(name: str, source_name: str) -> bool:
        entry = files.get(name) or {}
        return (entry.get("size"), entry.get("sha256")) == (
            source.store.size(source_name),
            source.store.sha256(source_name),
        )

    copied = {name: source_name for name, source_name in _copied_files(source).items() if source_name != CARD}
    return sorted(source_name for name, source_name in copied.items() if not is_as_copied(name, source_name))


def names_beside(source: Checkpoint) -> list[str]:
    """Files that an output made from `source` may have beside its tensor files."""
    return [INDEX, CONFIG, CALIBRATION, CARD, REPORT, MANIFEST, *_copied_files(source)]


def finish(
    output: Output,
    source: Checkpoint,
    records: list[FileRecord],
    config: Mapping[str, object],
    report: Mapping[str, object],
    card: str,
) -> None:
    """Write all files beside the finished tensor files, the manifest last.

    The source's own card is kept as SOURCE_CARD. The record of a calibration is copied from the source, unless
    `records` contain a new one. The manifest lists every file except itself and the report, which contains times and
    therefore differs between runs.

    Args:
        records: the tensor files, and further files that the run has written.
    """
    output.ticket.require()
    store, copied = output.store, _copied_files(source)
    if source.store.exists(CALIBRATION) and CALIBRATION not in {record.name for record in records}:
        copied[CALIBRATION] = CALIBRATION
    _note_finishing(store, [INDEX, CONFIG, CALIBRATION, CARD, *copied])
    documents: dict[str, Mapping[str, object]] = {INDEX: _index(store, records), CONFIG: config}
    records = [
        *records,
        *(_copy(source.store, source_name, store, name) for name, source_name in copied.items()),
        store.write(CARD, [card.encode()]),
        *(store.write_json(name, document) for name, document in documents.items()),
    ]
    store.write_json(REPORT, report)
    _commit(output, {record.name: record.to_json() for record in records})


def _note_finishing(store: Store, names: list[str]) -> None:
    """Record the files to be written, and remove those that only an interrupted attempt wrote."""
    clear(store, set(read_list(store, FINISHING)) - set(names))
    store.write_json(FINISHING, names)


def _copy(source: Store, source_name: str, target: Store, name: str) -> FileRecord:
    return target.write(name, source.stream(source_name, 0, source.size(source_name)))


def _index(store: Store, records: Iterable[FileRecord]) -> Mapping[str, object]:
    """The index of the tensor files among `records`, from their headers."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for record in records:
        if not TENSOR_FILE.match(record.name):
            continue
        for info in read_header(store, record.name)[1]:
            assert info.name not in weight_map, f"{info.name} is in two files"  # make_plan has refused it
            weight_map[info.name] = record.name
            total_bytes += info.nbytes
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _commit(output: Output, files: Mapping[str, object]) -> None:
    """Remove stale files and write the manifest with the entries `files`, which makes the output complete."""
    store = output.store
    written = read_list(store, WRITTEN)
    clear_unfinished(store, written)  # of workers that were killed or late
    clear(store, set(written) - files.keys() - {REPORT})
    output.ticket.require()
    identity = full_identity(output.identity)
    store.write_json(MANIFEST, {"format_version": FORMAT_VERSION, "identity": identity, "files": files})
    _remove_run_files(output)


def _remove_run_files(output: Output) -> None:
    """Remove `.swsc`; the lease last, so that no other run begins before everything else is removed."""
    assert output.lease is not None
    folder = output.store.below(".swsc")
    for name in folder.entries():
        if not LEASE_FILE.endswith(f"/{name}"):
            folder.remove(name)
    output.lease.release()
    folder.remove_empty()
