"""An output directory: how it is begun, gone on with, replaced and committed.

While a run is under way the directory holds finished tensor files and, under `.swsc`, what was asked for, who writes, and a
record for each finished file. Index, config, report and, last of all, the manifest make it a model; then `.swsc` goes. So a
directory without a manifest is never taken for a finished one, and a run that was cut short can go on. Whoever comes late, from
a run that has lost the directory, is told apart by its ticket, and its files by the run that their records name.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.errors import OutputError, UserError
from pipeline.model.artifact import FORMAT_VERSION
from pipeline.model.checkpoint import INDEX, MANIFEST, RUN, Checkpoint, read_header
from pipeline.model.lease import LEASE, Lease, Ticket, acquire, is_free
from pipeline.model.parts import DONE, differences
from pipeline.model.store import FileRecord, Store

REPORT = "swsc_report.json"
CALIBRATION = "swsc_calibration.json"  # traces of the text that was calibrated on (measure/overlap.py)
_REPLACED = ".swsc/replaced.json"  # names of files of an output that this one replaces
_FINISHING = ".swsc/finishing.json"  # names of the files beside tensors that a run was about to write
_HASHING = 8  # files at a time
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
        return replace(self.lease.ticket, run=_digest(self.identity))

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
    identity = {**identity, "format_version": FORMAT_VERSION}
    finished_before = store.exists(MANIFEST)
    if finished_before and _is_finished(store, identity, overwrite):
        return Output(store, identity, {}, None)
    require_replaceable(store, identity, overwrite)
    made = not store.is_there
    lease = acquire(store, wait)
    try:
        if not finished_before and _is_finished(store, identity, overwrite):  # by the run that we waited for
            lease.release()
            return Output(store, identity, {}, None)
        return Output(store, identity, _found(store, identity, overwrite), lease, made)
    except BaseException:
        lease.release()
        raise


def require_replaceable(store: Store, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Raise OutputError if the directory is not ours, or is another output and must not be replaced.

    `identity` may be a part of it: that is compared.
    """
    if not (store.exists(MANIFEST) or store.exists(RUN)) and store.entries().keys() - {".swsc"}:
        raise OutputError(f"{store.root}: not empty and not an output of this tool; choose an empty or new directory")
    if overwrite:
        return
    if store.exists(MANIFEST):
        _same(store, _read_own(store, MANIFEST, "identity")["identity"], identity, identity)
    elif store.exists(RUN):
        _same(store, _read_own(store, RUN), identity, identity)


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_finished(store: Store, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the directory is complete and whole; raises OutputError if it is complete, but another output or damaged."""
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
    if is_free(store):
        store.remove(".swsc")  # a run that was cut off right after its manifest leaves it
    return True


def _found(
    store: Store, identity: dict[str, Any], overwrite: bool
) -> dict[str, tuple[FileRecord, list[dict[str, Any]]]]:
    """What is finished of a run of this identity; a new one is begun, in the place of another one if that is meant."""
    if store.exists(RUN) and not store.exists(MANIFEST) and _is_same_run(store, identity, overwrite):
        _clear_replaced(store)
        return _finished(store, _digest(identity))
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
    """Files of a finished output, or of one that was about to be, as far as what lists them can be read."""
    names = [REPORT, *_read_list(store, _FINISHING)]
    try:
        return [*names, *_read_own(store, MANIFEST, "files")["files"]]
    except (OutputError, OSError):
        return names


def _clear_replaced(store: Store) -> None:
    """Remove what an output that is being replaced has left, files and records."""
    if not store.exists(_REPLACED):
        return
    replaced = _read_list(store, _REPLACED)
    for name in store.names():
        if name in replaced or _OURS.match(name):
            store.remove(name)
    store.remove(DONE)
    store.remove(_FINISHING)
    store.remove(_REPLACED)


def _read_own(store: Store, name: str, *keys: str) -> dict[str, Any]:
    """A file of ours; OutputError if it is damaged."""
    try:
        value = store.read_json(name)
        return {**value, **{key: dict(value[key]) for key in keys}}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{store.root}: {name} is damaged ({error}); make the output again by --overwrite") from None


def _read_list(store: Store, name: str) -> list[str]:
    """A list of names that we wrote; empty if it is not there."""
    value = store.read_json(name) if store.exists(name) else []
    return [str(one) for one in value] if isinstance(value, list) else []


def _same(store: Store, before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str] | None = None) -> None:
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now} if keys is None else keys)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OutputError(
            f"{store.root}: holds an output of other settings ({'; '.join(changed)}); choose another directory, or replace it"
            " by --overwrite"
        )


def _require_whole(store: Store, files: Mapping[str, Any]) -> None:
    """Raise OutputError that names a file which is not as it was written."""
    try:
        with ThreadPoolExecutor(_HASHING) as pool:
            found = [line for lines in pool.map(lambda one: differences(store, *one), files.items()) for line in lines]
        _read_own(store, REPORT)
    except FileNotFoundError:
        found = [f"{REPORT} is missing"]
    except (KeyError, TypeError) as error:
        found = [f"{MANIFEST} is damaged ({error})"]
    if found:
        raise OutputError(f"{store.root}: {found[0]}; make the output again by --overwrite")


def _finished(store: Store, run: str) -> dict[str, tuple[FileRecord, list[dict[str, Any]]]]:
    """Files of an interrupted `run` that are as their records say; anything else is removed."""
    finished = {}
    for entry in store.below(DONE).names():
        file = entry.removesuffix(".json")
        try:
            done = store.read_json(f"{DONE}/{entry}")
            record = FileRecord(file, done["size"], done["sha256"], done.get("tensors", {}))
            sound = done["run"] == run and not differences(store, file, record.about)
        except (ValueError, KeyError, TypeError):
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
    for name in [name for name in output.store.names() if _OURS.match(name)]:
        output.store.remove(name)
    _leave(output)
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
    beside = [INDEX, "config.json", CALIBRATION, *source.extras]
    for name in set(_read_list(store, _FINISHING)) & set(store.names()) - set(beside):
        store.remove(name)  # of a run that was cut off here, when the source had other files
    store.write_json(_FINISHING, beside)
    for record in [record for record in records if record.name.endswith(".safetensors")]:
        for info in read_header(store, record.name)[1]:
            assert info.name not in weight_map, f"{info.name} stands twice"  # make_plan has refused it
            weight_map[info.name] = record.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    records = records + [
        store.write(name, source.store.stream(name, 0, source.store.size(name))) for name in source.extras
    ]
    records += [store.write_json(INDEX, index), store.write_json("config.json", config)]
    store.write_json(REPORT, report)
    files = {record.name: record.about for record in records}
    for name in [name for name in store.names() if _OURS.match(name) and name not in files]:
        store.remove(name)  # of workers that were killed, or came late
    output.ticket.require()
    store.write_json(MANIFEST, {"format_version": FORMAT_VERSION, "identity": output.identity, "files": files})
    _leave(output)


def _leave(output: Output) -> None:
    """Remove `.swsc`; the lease last, so that no other run is there before all else is gone."""
    assert output.lease is not None
    below = output.store.below(".swsc")
    for name in below.entries():
        if not LEASE.endswith(f"/{name}"):
            below.remove(name)
    output.lease.release()
    below.remove_empty()
