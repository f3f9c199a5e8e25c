"""An output directory: how it is begun, gone on with, replaced and committed.

While a run is under way the directory holds finished tensor files and, under `.swsc`, what was asked for, who writes, and a
record for each finished file. Index, config, report and, last of all, the manifest make it a model; then `.swsc` goes. So a
directory without a manifest is never taken for a finished one, and a run that was cut short can go on. Whoever comes late, from
a run that has lost the directory, is told apart by its ticket, and its files by the run that their records name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.architectures.model_config import ModelConfig
from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint, read_header
from pipeline.checkpoints.weight_files import INDEX, TENSOR_FILE
from pipeline.errors import DISK_FULL_ERRNOS, CheckpointError, DiskFull, OutputError
from pipeline.outputs.atomic_edit import settle
from pipeline.outputs.existing_output import (
    Finished,
    begun_identity,
    is_finished,
    require_replaceable,
    what_is_finished,
)  # fmt: skip
from pipeline.outputs.model_card import CARD, SOURCE_CARD
from pipeline.outputs.owned_files import FINISHING, REPORT, WRITTEN, clear, clear_unfinished, read_list
from pipeline.storage.cache_key import full_identity, run_digest
from pipeline.storage.lease import LEASE_FILE, Lease, Ticket, acquire_lease
from pipeline.storage.records import CalibrationRecord, ManifestRecord, read_record
from pipeline.storage.store import FileRecord, Store
from swsc_core.compressed.config_json import FORMAT_VERSION

CALIBRATION = "swsc_calibration.json"  # traces of the text that was calibrated on (measure/overlap.py)


@dataclass(frozen=True)
class Output:
    """An output directory that this run may write, until it leaves the context.

    Attributes:
        identity: what makes two runs the same: settings and fingerprint of the source.
        finished: records of files that an earlier run of the same identity completed, by file name, with their rows.
        lease: None if the whole directory is finished already.
        made_directory: the directory was not there before.
    """

    store: Store
    identity: dict[str, Any]
    finished: Finished
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
        return self.lease is None

    @property
    def ticket(self) -> Ticket:
        """What a commit must show."""
        assert self.lease is not None
        return replace(self.lease.ticket, run=run_digest(self.identity))

    @property
    def finished_bytes(self) -> int:
        return sum(record.size for record, _ in self.finished.values())


def begin(
    store: Store, identity: dict[str, Any], overwrite: bool = False, on_wait: Callable[[str], None] | None = None,
    names: Iterable[str] = (), source: Store | None = None, anew: bool = False,
) -> Output:  # fmt: skip
    """Open an output directory for a run, or find out how far an earlier run of it came.

    Args:
        overwrite: an output of other settings, or a damaged one, is replaced.
        on_wait: told that another run is at work there, for which we then wait; None: that is refused.
        names: of the files that the run writes; nothing else is ever replaced or removed.
        source: what the output is made of.
        anew: a finished output of this very identity is replaced, too.

    Raises:
        OutputError: the directory holds something else, or was begun with other settings or another source, or another run
            is writing there, or it is the source by a path of which nobody knew.
    """
    names = list(names)
    finished_before = store.exists(MANIFEST)
    if finished_before:
        settle(store)
    if finished_before and not anew and is_finished(store, identity, overwrite):
        return Output(store, identity, {}, None)
    require_replaceable(store, identity, overwrite, names)
    made = not store.is_there
    lease = acquire_lease(store, on_wait)
    try:
        if source and lease.is_seen_in(source):
            raise OutputError(
                f"{store.root}: what is written there appears in {source.root}: one place by two paths; choose another output"
            )
        if not finished_before and is_finished(store, identity, overwrite):  # by the run that we waited for
            lease.release()
            return Output(store, identity, {}, None)
        finished = what_is_finished(store, identity, overwrite, names)
        return Output(store, begun_identity(store, identity), finished, lease, made)
    except BaseException:
        lease.release()
        store.below(".swsc").remove_empty()
        if made:
            store.remove_empty()
        raise


def known_traces(store: Store) -> frozenset[str]:
    """Traces of the texts that the model in `store` was calibrated on; none, if it was on none.

    Raises:
        CheckpointError: what says so is damaged.
    """
    try:
        return frozenset(
            read_record(store, CALIBRATION, CalibrationRecord)["traces"] if store.exists(CALIBRATION) else ()
        )
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}: {CALIBRATION} is damaged ({error}): what the model was calibrated on is not known; download it"
            " again, or compress again"
        ) from None


def abandon(output: Output) -> None:
    """Take back what this run wrote, after a user's mistake that only showed while it ran (NaN in a weight)."""
    if output.finished:
        return
    written = read_list(output.store, WRITTEN)
    clear_unfinished(output.store, written)
    clear(output.store, written)
    _leave(output)
    if output.made_directory:
        output.store.remove_empty()


def _copied(source: Checkpoint) -> dict[str, str]:
    """Files that are copied from the source: name in the output -> name in the source."""
    copied = {name: name for name in source.extras if name != CARD}
    if CARD in source.extras:
        copied.setdefault(SOURCE_CARD, CARD)
    return copied


def changed_since(store: Store, source: Checkpoint) -> list[str]:
    """Files that a finished output was to copy from its source, and holds otherwise: they were changed or added there since.

    The source's card is left aside: it may change with every visit to the Hub.
    """
    try:
        files = read_record(store, MANIFEST, ManifestRecord)["files"]
    except (FileNotFoundError, ValueError):
        return []

    def is_as_copied(name: str, own: str) -> bool:
        about = files.get(name) or {}
        return about.get("size") == source.store.size(own) and about.get("sha256") == source.store.sha256(own)

    return sorted(own for name, own in _copied(source).items() if own != CARD and not is_as_copied(name, own))


def names_beside(source: Checkpoint) -> list[str]:
    """Names of the files that an output made of `source` may have beside its tensors."""
    return [INDEX, "config.json", CALIBRATION, CARD, REPORT, MANIFEST, *_copied(source)]


def finish(
    output: Output, source: Checkpoint, records: list[FileRecord], config: ModelConfig, report: dict[str, Any], card: str
) -> None:  # fmt: skip
    """Write everything that makes finished tensor files a model; the manifest last.

    The source's own card gives way to `card`, and is kept under another name, unless the source keeps one so already.

    What a source was calibrated on goes on to what is made of it, unless `records` say it already.

    The manifest lists every file but itself and the report, which holds times and therefore differs between runs.
    """
    output.ticket.require()
    store, weight_map, total = output.store, {}, 0
    copied = _copied(source)
    if source.store.exists(CALIBRATION) and CALIBRATION not in {record.name for record in records}:
        copied[CALIBRATION] = CALIBRATION
    beside = [INDEX, "config.json", CALIBRATION, CARD, *copied]
    clear(store, set(read_list(store, FINISHING)) - set(beside))  # of a run that was cut off when the source had others
    store.write_json(FINISHING, beside)
    for record in [record for record in records if TENSOR_FILE.match(record.name)]:
        for info in read_header(store, record.name)[1]:
            assert info.name not in weight_map, f"{info.name} stands twice"  # make_plan has refused it
            weight_map[info.name] = record.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    records = records + [
        store.write(name, source.store.stream(own, 0, source.store.size(own))) for name, own in copied.items()
    ]
    records += [
        store.write(CARD, [card.encode()]),
        store.write_json(INDEX, index),
        store.write_json("config.json", config),
    ]
    store.write_json(REPORT, report)
    files = {record.name: record.to_json() for record in records}
    written = read_list(store, WRITTEN)
    clear_unfinished(store, written)  # of workers that were killed, or came late
    clear(store, set(written) - files.keys() - {REPORT})
    output.ticket.require()
    store.write_json(
        MANIFEST, {"format_version": FORMAT_VERSION, "identity": full_identity(output.identity), "files": files}
    )
    _leave(output)


def _leave(output: Output) -> None:
    """Remove `.swsc`; the lease last, so that no other run is there before all else is gone."""
    assert output.lease is not None
    below = output.store.below(".swsc")
    for name in below.entries():
        if not LEASE_FILE.endswith(f"/{name}"):
            below.remove(name)
    output.lease.release()
    below.remove_empty()
