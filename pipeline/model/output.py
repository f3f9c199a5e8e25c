"""An output directory: how it is begun, gone on with, replaced and committed.

While a run is under way the directory holds finished tensor files and, under `.swsc`, what was asked for, who writes, and a
record for each finished file. Index, config, report and, last of all, the manifest make it a model; then `.swsc` goes. So a
directory without a manifest is never taken for a finished one, and a run that was cut short can go on.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.errors import OutputError, UserError
from pipeline.model.artifact import FORMAT_VERSION
from pipeline.model.checkpoint import INDEX, MANIFEST, RUN, Checkpoint, read_header
from pipeline.model.files import TEMPORARY
from pipeline.model.lease import Lease, Ticket, acquire
from pipeline.model.parts import DONE
from pipeline.model.store import FileRecord, Store

REPORT = "swsc_report.json"
CALIBRATION = "swsc_calibration.json"  # traces of the text that was calibrated on (measure/overlap.py)
_REPLACED = ".swsc/replaced.json"  # names of files of an output that this one replaces
_OURS = re.compile(r"(model-\d+-of-\d+\.safetensors|.*\.partial)$")  # names of tensor files and of unfinished files


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
    finished: dict[str, tuple[FileRecord, list[dict[str, Any]]]]
    lease: Lease | None
    made_directory: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lease:
            self.lease.release()

    @property
    def complete(self) -> bool:
        return self.lease is None

    @property
    def ticket(self) -> Ticket:
        """What a commit must show."""
        assert self.lease is not None
        return self.lease.ticket

    @property
    def finished_bytes(self) -> int:
        return sum(record.size for record, _ in self.finished.values())


def begin(
    store: Store, identity: dict[str, Any], overwrite: bool = False, wait: Callable[[str], None] | None = None
) -> Output:
    """Open an output directory for a run, or find out how far an earlier run of it came.

    Args:
        overwrite: an output of other settings, or a damaged one, is replaced.
        wait: told that another run is at work there, for which we then wait; None: that is refused.

    Raises:
        OutputError: the directory holds something else, or was begun with other settings or another source, or another run
            is writing there.
    """
    if _is_finished(store, identity, overwrite):
        return Output(store, identity, {}, None)
    if not (store.exists(MANIFEST) or store.exists(RUN)) and store.entries().keys() - {".swsc"}:
        raise OutputError(f"{store.root}: not empty and not an output of this tool; choose an empty or new directory")
    if store.exists(RUN) and not overwrite:
        _same(store, _read_own(store, RUN), identity)
    made = not store.is_there
    lease = acquire(store, wait)
    try:
        if _is_finished(store, identity, overwrite):  # by the run that we waited for
            lease.release()
            return Output(store, identity, {}, None)
        return Output(store, identity, _found(store, identity, overwrite), lease, made)
    except BaseException:
        lease.release()
        raise


def _is_finished(store: Store, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the directory is complete; raises OutputError if it is, but is another output or damaged."""
    if not store.exists(MANIFEST):
        return False
    try:
        manifest = _read_own(store, MANIFEST, "identity", "files")
        _same(store, manifest["identity"], identity)
        _require_whole(store, manifest["files"])
    except UserError:  # another output, a damaged one, or one whose manifest names what is outside
        if overwrite:
            return False
        raise
    store.remove(".swsc")  # a run that was cut off right after its manifest leaves it
    return True


def _found(
    store: Store, identity: dict[str, Any], overwrite: bool
) -> dict[str, tuple[FileRecord, list[dict[str, Any]]]]:
    """What is finished of a run of this identity; a new one is begun, in the place of another one if that is meant."""
    if store.exists(RUN) and not store.exists(MANIFEST) and _is_same_run(store, identity, overwrite):
        _clear_replaced(store)
        return _finished(store)
    if store.exists(RUN) or store.exists(MANIFEST):
        store.write_json(_REPLACED, _files_of(store))  # first: it is cleared once the run is of the new identity
    store.write_json(RUN, identity)
    store.remove(MANIFEST)
    _clear_replaced(store)
    return {}


def _is_same_run(store: Store, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run under way is of this identity; raises OutputError if it is not and must not be replaced."""
    try:
        _same(store, _read_own(store, RUN), identity)
    except OutputError:
        if overwrite:
            return False
        raise
    return True


def _files_of(store: Store) -> list[str]:
    """Files of a finished output, as far as its manifest can be read."""
    try:
        return [REPORT, *_read_own(store, MANIFEST, "files")["files"]]
    except (OutputError, OSError):
        return []


def _clear_replaced(store: Store) -> None:
    """Remove what an output that is being replaced has left, files and records."""
    if not store.exists(_REPLACED):
        return
    replaced = _read_list(store, _REPLACED)
    for name in store.names():
        if name in replaced or _OURS.match(name):
            store.remove(name)
    store.remove(DONE)
    store.remove(_REPLACED)


def _read_own(store: Store, name: str, *keys: str) -> dict[str, Any]:
    """A file of ours; OutputError if it is damaged."""
    try:
        value = store.read_json(name)
        return {**value, **{key: dict(value[key]) for key in keys}}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{store.root}: {name} is damaged ({error}); make the output again by --overwrite") from None


def _read_list(store: Store, name: str) -> list[str]:
    value = store.read_json(name)
    return [str(one) for one in value] if isinstance(value, list) else []


def _same(store: Store, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OutputError(
            f"{store.root}: holds an output of other settings ({'; '.join(changed)}); choose another directory, or replace it"
            " by --overwrite"
        )


def _require_whole(store: Store, files: Mapping[str, Any]) -> None:
    for name, about in files.items():
        if not store.exists(name) or store.size(name) != about["size"]:
            raise OutputError(
                f"{store.root}: {name} is missing or has another size than it was written with; make the output again by"
                " --overwrite"
            )


def _finished(store: Store) -> dict[str, tuple[FileRecord, list[dict[str, Any]]]]:
    """Files of an interrupted run that are as their records say; anything else is removed."""
    finished = {}
    for entry in store.below(DONE).names():
        file = entry.removesuffix(".json")
        try:
            done = store.read_json(f"{DONE}/{entry}")
            record = FileRecord(file, done["size"], done["sha256"], done.get("tensors", {}))
            sound = store.exists(file) and store.size(file) == record.size and store.sha256(file) == record.sha256
        except (ValueError, KeyError):
            sound = False
        if sound:
            finished[file] = (record, done["rows"])
    for name in store.names():
        if name not in finished and _OURS.match(name):
            store.remove(name)
    return finished


def abandon(output: Output) -> None:
    """Take back what this run wrote, after a user's mistake that only showed while it ran (NaN in a weight)."""
    if output.finished:
        return
    for name in [name for name in output.store.names() if _OURS.match(name)] + [".swsc"]:
        output.store.remove(name)
    if output.made_directory:
        output.store.remove_empty()


def finish(
    output: Output, source: Checkpoint, records: list[FileRecord], config: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write everything that makes finished tensor files a model; the manifest last.

    The manifest lists every file but itself and the report, which holds times and therefore differs between runs.
    """
    output.ticket.require()
    store, weight_map, total = output.store, {}, 0
    for record in [record for record in records if record.name.endswith(".safetensors")]:
        for info in read_header(store, record.name)[1]:
            weight_map[info.name] = record.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    records = records + [
        store.write(name, source.store.stream(name, 0, source.store.size(name))) for name in source.extras
    ]
    records += [store.write_json(INDEX, index), store.write_json("config.json", config)]
    store.write_json(REPORT, report)
    for name in [name for name in store.names() if name.endswith(TEMPORARY)]:  # of workers that were killed
        store.remove(name)
    files = {record.name: record.about for record in records}
    store.write_json(MANIFEST, {"format_version": FORMAT_VERSION, "identity": output.identity, "files": files})
    store.remove(".swsc")
