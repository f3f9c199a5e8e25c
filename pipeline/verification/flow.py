"""Verification of a finished output: every file is hashed and compared with the manifest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.tensor_io import link_problem
from pipeline.engine.stage import Pools
from pipeline.errors import CheckpointError, DamageError
from pipeline.outputs.atomic_edit import with_interrupted_edit
from pipeline.outputs.owned_files import REPORT, competing_weights
from pipeline.outputs.stage import run_check_stage
from pipeline.storage.records import ManifestRecord, ReportRecord, read_record
from pipeline.storage.store import FileRecord, Store

# Number of findings that an error names.
_NAMED = 8
_OVERWRITE = "write the output again with --overwrite"
_MOVE_AWAY = "move files that do not belong to the output to another place, and replace links by the files themselves"


@dataclass(frozen=True)
class VerifiedOutput:
    """Number of files of an output and their bytes, all of which match the manifest."""

    files: int
    nbytes: int


def verify_output(location: str, pools: Pools) -> VerifiedOutput:
    """Hash the files of the output at `location` on the workers.

    Raises:
        CheckpointError: there is no finished output.
        DamageError: names files that are missing, cut or changed, with the tensors in question, and links and weight
            files that the manifest does not list.
    """
    store = Store.at(location)
    files = with_interrupted_edit(store, manifest_of(store)["files"])
    records = {name: FileRecord.from_json(name, entry) for name, entry in files.items()}
    checked = {name: record for name, record in records.items() if not link_problem(store, name)}
    damage = {"": list(_report_damage(store)), **run_check_stage(pools, "verify", store, checked)}
    damaged = [line for name in sorted(damage) for line in damage[name]]
    foreign = list(_foreign_files(store, files))
    if damaged or foreign:
        raise DamageError(f"{location}: damaged: {_findings(damaged, foreign)}")
    return VerifiedOutput(len(files), sum(record["size"] for record in files.values()))


def _findings(damaged: list[str], foreign: list[str]) -> str:
    """Findings and remedies: `--overwrite` replaces files of the output only, foreign files have to be moved."""
    parts = []
    for lines, remedy in ((damaged, _OVERWRITE), (foreign, _MOVE_AWAY)):
        more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        parts += [f"{'; '.join(lines[:_NAMED])}{more}; {remedy}"] if lines else []
    return "; ".join(parts)


def manifest_of(store: Store) -> dict[str, Any]:
    """The manifest of an output; CheckpointError if there is none, DamageError if it cannot be read."""
    if link := link_problem(store, MANIFEST):
        raise DamageError(f"{store.root}: damaged: {link}; {_MOVE_AWAY}")
    if not store.exists(MANIFEST):
        raise CheckpointError(
            f"{store.root}: no {MANIFEST}: the output is not finished (run the command that writes it again), or"
            " another tool saved it, which writes no hashes"
        )
    try:
        return read_record(store, MANIFEST, ManifestRecord)
    except ValueError as error:
        raise DamageError(f"{store.root}: {MANIFEST} is damaged ({error}); {_OVERWRITE}") from None


def _foreign_files(store: Store, files: Mapping[str, object]) -> Iterator[str]:
    """Links, and weight or adapter files that the manifest does not list: a loader would read them."""
    yield from filter(None, (link_problem(store, name) for name in sorted({*store.entries(), *files})))
    weights = [name for name in store.names() if name.endswith(".safetensors") and name not in files]
    yield from (f"{name} is not one of its files" for name in sorted({*weights, *competing_weights(store, files)}))


def _report_damage(store: Store) -> Iterator[str]:
    """Damage of the report, which has no hash in the manifest because it holds times."""
    try:
        if not link_problem(store, REPORT):
            read_record(store, REPORT, ReportRecord)
    except (OSError, ValueError):
        yield f"{REPORT} is missing or not a report"
