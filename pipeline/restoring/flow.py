"""Restoration of a compressed model to a plain dense checkpoint that any loader opens.

With an adapter, the dense weights hold the clustered part W′ alone, and the low-rank part is written beside them as a
LoRA adapter for PEFT: the folder `swsc_adapter`, under the same manifest.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.sources.gguf import is_gguf
from pipeline.compression.job import copy_task
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Destination, Job, Task, TaskResult
from pipeline.errors import ConfigError
from pipeline.models.lora_export import adapter_config, carried_by_adapter
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.card_content import card_of_restoring
from pipeline.outputs.owned_files import ADAPTER_FILES
from pipeline.outputs.preflight import begin_with_room, examine, require_unmixed
from pipeline.outputs.report import versions
from pipeline.outputs.stage import check_on, run_output_stage
from pipeline.outputs.transaction import Output, OutputRequest, finish, names_beside
from pipeline.planning.memory import restoring_memory
from pipeline.planning.time_model import copying_seconds, restoring_seconds
from pipeline.redaction import redacted_argv
from pipeline.restoring.job import ExtractLowRank, RestoreTensors
from pipeline.restoring.plan import RestorePlan, make_restore_plan
from pipeline.storage.cache_key import VERSIONS
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord, Store
from swsc_core.compressed.config_json import FORMAT_VERSION

# Bytes of a weight in most checkpoints, for the proportion of restored and copied files.
_VALUE_BYTES = 2


@dataclass(frozen=True)
class RestoreOptions:
    """How a model is restored.

    Attributes:
        overwrite: replace an output of other options, or a damaged one.
        adapter: write the low-rank part as a LoRA adapter where one can carry it, instead of adding it to the weights.
        trusted: code that the model brings may run, to find out which matrices are linear layers.
    """

    overwrite: bool = False
    adapter: bool = False
    trusted: bool = False


_DEFAULT_OPTIONS = RestoreOptions()


def restore_model(
    location: str, output: str, pools: Pools, options: RestoreOptions = _DEFAULT_OPTIONS
) -> dict[str, object]:
    """Restore the compressed tensors of the model at `location`, and copy the others, into the directory `output`.

    Returns:
        The report, as swsc_report.json holds it.

    Raises:
        ConfigError: the model is not compressed, or has nothing that an adapter could carry.
        OutputError: the directory holds something else, another run writes there, or the disk has not enough room.
        RunError: tasks failed; finished files are kept, and the same call resumes.
    """
    model = None if is_gguf(location) else open_model(location)
    if model is None or not model.entries:
        raise ConfigError(f"{location}: not a compressed model, so there is nothing to restore; use it as it is")
    store, source = Store.at(output), model.checkpoint
    require_unmixed(source, store)
    examine(model, options.trusted)
    plan = make_restore_plan(model, carried_by_adapter(model, location, options.trusted) if options.adapter else {})
    names = [*plan.files, *names_beside(source)]
    request = OutputRequest(store, _identity(model, options), names, options.overwrite, check=check_on(pools))
    with begin_with_room(request, source, plan.nbytes) as out:
        report = _report(plan)
        if not out.complete:
            records = _write_files(plan, out, pools)
            finish(out, source, records, model.config, report, card_of_restoring(model))
    return report


def _identity(model: Model, options: RestoreOptions) -> dict[str, object]:
    """What the bytes of the output depend on."""
    versions_of_output = {"algorithm": VERSIONS["output"], "format_version": FORMAT_VERSION}
    adapter = {"adapter": True} if options.adapter else {}
    return {"restored_from": model.checkpoint.fingerprint, **versions_of_output, **adapter}


def _report(plan: RestorePlan) -> dict[str, object]:
    left_out = dict(plan.model.checkpoint.ignored_files)
    return {
        "format": "dense",
        "tensors": plan.rows(),
        "left_out": left_out,
        "versions": versions(),
        "argv": redacted_argv(),
    }


def _write_files(plan: RestorePlan, out: Output, pools: Pools) -> list[FileRecord]:
    """Run the tasks of all files that are not finished; returns the records of all files, sorted by name."""
    planned = set(plan.files)  # an earlier release may have finished other files
    records = {file: record for file, (record, _) in out.finished.items() if file in planned}

    def add(done: TaskResult[FileRecord | None]) -> None:
        record = done.record or done.value
        assert record is not None  # every task writes a file
        records[record.name] = record

    tasks = [task for task in _tasks(plan, out.ticket) if task.key not in out.finished]
    largest = max(plan.model.count(name) for task in plan.restored for name in task.names)
    memory = restoring_memory(largest, plan.largest_file_bytes + 2 * plan.adapter_bytes)
    run_output_stage(pools, Stage("restore", memory, unit="files", on_cpu=True), tasks, add, out)
    ordered = [records[name] for name in sorted(records)]
    if plan.adapter_layers:
        ordered.append(out.store.write_json(ADAPTER_FILES[1], adapter_config(plan.model, plan.adapter_layers)))
    return ordered


def _tasks(plan: RestorePlan, ticket: Ticket) -> list[Task[Any]]:
    """A task per file."""

    def task(file: str, job: Job[None], label: str, nbytes: int) -> Task[Any]:
        work = copying_seconds(nbytes) + restoring_seconds(nbytes // _VALUE_BYTES)
        destination = Destination(ticket, file)
        return Task(file, job, label, outputs=1, commit_to=destination, work=work, nbytes=nbytes)

    source, adapter_layers = plan.model.checkpoint.store, plan.adapter_layers
    tasks = []
    for restored in plan.restored:
        without_low_rank = frozenset(name for name in restored.names if name in adapter_layers)
        job = RestoreTensors(source.root, restored.names, without_low_rank)
        tasks.append(task(restored.file, job, restored.layer, restored.nbytes))
    tasks += [copy_task(source, copy, ticket) for copy in plan.copied]
    if adapter_layers:
        low_rank = ExtractLowRank(source.root, dict(adapter_layers))
        tasks.append(task(ADAPTER_FILES[0], low_rank, "low-rank part", plan.adapter_bytes))
    return tasks
