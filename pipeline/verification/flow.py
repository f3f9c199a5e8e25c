"""Every byte of a finished output against its manifest: what was written is what lies there."""

from collections.abc import Iterator
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.tensor_io import link_problem
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import CheckpointError, DamageError
from pipeline.outputs.atomic_edit import as_amended
from pipeline.outputs.owned_files import REPORT, rivals
from pipeline.planning.cost_model import WORKER_BASE
from pipeline.storage.records import ManifestRecord, ReportRecord, read_record
from pipeline.storage.store import Store
from pipeline.verification.job import CheckFile

_NAMED = 8  # findings that an error names
_AGAIN = "make it again by --overwrite"
_AWAY = "move away what is not one of its files (and put those in the place of links to them)"


def verify_output(location: str, pools: Pools) -> dict[str, Any]:
    """Hash the files of the output at `location` over the workers, each file read in pieces.

    Returns {"files": number, "bytes": number} of what was found whole.

    Raises:
        CheckpointError: no finished output there.
        DamageError: names what is missing, cut or changed, down to the tensor, and links and tensor files that were added.
    """
    store = Store.at(location)
    files = as_amended(store, manifest_of(store)["files"])
    findings: dict[Any, list[str]] = {"": list(_of_report(store))}

    def note(done: TaskResult[list[str]]) -> None:
        findings[done.task.key] = done.value

    tasks = [
        Task(name, CheckFile(store, name, about), name, weight=about["size"])
        for name, about in files.items()
        if not link_problem(store, name)
    ]
    stage = Stage("verify", WORKER_BASE, unit="files", on_cpu=True)
    run_stage(pools, stage, sorted(tasks, key=lambda task: -task.weight), note)
    damage = [line for name in sorted(findings) for line in findings[name]]
    strange = list(_strange(store, files))
    if damage or strange:
        raise DamageError(f"{location}: damaged: {_told(damage, strange)}")
    return {"files": len(files), "bytes": sum(about["size"] for about in files.values())}


def _told(damage: list[str], strange: list[str]) -> str:
    """What was found, and what helps: `--overwrite` replaces the output's own files, and leaves those that somebody else has put there."""
    parts = []
    for found, remedy in ((damage, _AGAIN), (strange, _AWAY)):
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        parts += [f"{'; '.join(found[:_NAMED])}{more}; {remedy}"] if found else []
    return "; ".join(parts)


def manifest_of(store: Store) -> dict[str, Any]:
    """What the output says of itself; CheckpointError if it says nothing."""
    if found := link_problem(store, MANIFEST):
        raise DamageError(f"{store.root}: damaged: {found}; {_AWAY}")
    if not store.exists(MANIFEST):
        raise CheckpointError(
            f"{store.root}: no {MANIFEST}: not a finished output (run the command that makes it again), or saved by another tool,"
            " which leaves no hashes to hold it against"
        )
    try:
        return read_record(store, MANIFEST, ManifestRecord)
    except ValueError as error:
        raise DamageError(
            f"{store.root}: {MANIFEST} is damaged ({error}); make the output again by --overwrite"
        ) from None


def _strange(store: Store, files: dict[str, Any]) -> Iterator[str]:
    """What is there beside its own files, or in place of them, and does harm: links, and files of tensors or adapters that the manifest does not know."""
    yield from filter(None, (link_problem(store, name) for name in sorted({*store.entries(), *files})))
    tensors = [name for name in store.names() if name.endswith(".safetensors") and name not in files]
    yield from (f"{name} is not one of its files" for name in sorted({*tensors, *rivals(store, files)}))


def _of_report(store: Store) -> Iterator[str]:
    """What is wrong with the report, which has no hash."""
    try:
        if not link_problem(store, REPORT):
            read_record(store, REPORT, ReportRecord)
    except (OSError, ValueError):
        yield f"{REPORT} is missing or no report"
