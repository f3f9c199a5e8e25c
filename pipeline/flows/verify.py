"""Every byte of a finished output against its manifest: what was written is what lies there."""

from collections.abc import Iterator
from typing import Any

from pipeline.errors import CheckpointError, DamageError
from pipeline.flows.compress import PoolMaker, run_alone
from pipeline.model.checkpoint import MANIFEST
from pipeline.model.forecast import WORKER_BASE
from pipeline.model.owned import REPORT, rivals
from pipeline.model.parts import linked
from pipeline.model.records import Manifest, Report, read_record
from pipeline.model.store import Store
from pipeline.run.pool import Done, Task

_NAMED = 8  # findings that an error names
_ADDED = "is not one of its files"


def verify_output(location: str, make_pool: PoolMaker) -> dict[str, Any]:
    """Hash the files of the output at `location` over the workers, each file read in pieces.

    Returns {"files": number, "bytes": number} of what was found whole.

    Raises:
        CheckpointError: no finished output there.
        DamageError: names what is missing, cut or changed, down to the tensor, and links and tensor files that were added.
    """
    store = Store.at(location)
    files = manifest_of(store)["files"]
    strange = list(_strange(store, files))
    findings: dict[Any, list[str]] = {"": strange}

    def note(done: Done) -> None:
        findings[done.task.key] = done.value

    tasks = [
        Task(name, "check_file", (store, name, about), label=name, weight=about["size"])
        for name, about in files.items()
    ]
    run_alone(sorted(tasks, key=lambda task: -task.weight), WORKER_BASE, note, make_pool, "verify", "files")
    found = [line for name in sorted(findings) for line in findings[name]]
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise DamageError(f"{location}: damaged: {'; '.join(found[:_NAMED])}{more}; {_remedy(found, strange)}")
    return {"files": len(files), "bytes": sum(about["size"] for about in files.values())}


def _remedy(found: list[str], strange: list[str]) -> str:
    """--overwrite leaves alone what is not the output's own."""
    added = [line for line in strange if line.endswith(_ADDED)]
    away = "move away what is not one of its files" if added else ""
    again = "make it again by --overwrite" if len(added) < len(found) else ""
    return ", and ".join(filter(None, (away, again)))


def manifest_of(store: Store) -> dict[str, Any]:
    """What the output says of itself; CheckpointError if it says nothing."""
    if found := linked(store, MANIFEST):
        raise DamageError(f"{store.root}: damaged: {found}; make it again by --overwrite")
    if not store.exists(MANIFEST):
        raise CheckpointError(
            f"{store.root}: no {MANIFEST}: not a finished output (run the command that makes it again), or saved by another tool,"
            " which leaves no hashes to hold it against"
        )
    try:
        return read_record(store, MANIFEST, Manifest)
    except ValueError as error:
        raise DamageError(
            f"{store.root}: {MANIFEST} is damaged ({error}); make the output again by --overwrite"
        ) from None


def _strange(store: Store, files: dict[str, Any]) -> Iterator[str]:
    """What no hash tells of: links, a report that cannot be read, tensor files that the manifest does not know."""
    yield from filter(None, (linked(store, name) for name in store.entries() if name not in files))
    try:
        if not linked(store, REPORT):
            read_record(store, REPORT, Report)
    except (OSError, ValueError):
        yield f"{REPORT} is missing or no report"
    tensors = [name for name in store.names() if name.endswith(".safetensors") and name not in files]
    yield from (f"{name} {_ADDED}" for name in sorted({*tensors, *rivals(store, files)}))
