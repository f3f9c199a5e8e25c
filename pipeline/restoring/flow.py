"""A compressed model directory in, a plain dense one out, which stock loaders open.

With `adapter` the dense matrices hold what is shared alone, and the low-rank part lies beside them as a LoRA adapter that stock
PEFT opens: the folder `swsc_adapter`, under the same manifest.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.sources.gguf import is_gguf
from pipeline.checkpoints.weight_files import tensor_files
from pipeline.compression.job import copy_task
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Destination, Task, TaskResult
from pipeline.errors import ConfigError
from pipeline.models.lora_export import adapter_bytes, adapter_config, carried_by_adapter
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.card_content import card_of_restoring
from pipeline.outputs.owned_files import ADAPTER_FILES
from pipeline.outputs.preflight import begin_with_room, examine, require_unmixed
from pipeline.outputs.report import versions
from pipeline.outputs.stage import run_output_stage
from pipeline.outputs.transaction import finish, names_beside
from pipeline.planning.cost_model import restoring_bytes
from pipeline.planning.plan import CopyTask
from pipeline.redaction import redacted_argv
from pipeline.restoring.job import ExtractLowRank, RestoreTensors
from pipeline.storage.cache_key import VERSIONS
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord, Store
from swsc_core.compressed.config_json import FORMAT_VERSION


def restore_model(
    location: str, output: str, pools: Pools, overwrite: bool = False, adapter: bool = False, trusted: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Restore every compressed tensor of the model at `location` and copy the others, shard by shard.

    Args:
        adapter: leave the low-rank part to a LoRA adapter, where one can carry it.
        trusted: code that the model brings may be run, to learn which matrices are linear layers.

    Raises:
        ConfigError: the model is not compressed, or has nothing that an adapter could carry.
        OutputError: the directory holds something else, another run writes there, or the disk has not enough room.
    """
    model = None if is_gguf(location) else open_model(location)
    if model is None or not model.entries:
        raise ConfigError(f"{location}: not a swsc model, nothing to restore; use it as it is")
    store, source = Store.at(output), model.checkpoint
    require_unmixed(source, store)
    examine(model, trusted)
    carried = carried_by_adapter(model, location, trusted) if adapter else {}
    identity = {"restored_from": source.fingerprint, "algorithm": VERSIONS["output"], "format_version": FORMAT_VERSION}
    identity |= {"adapter": True} if adapter else {}
    sizes = [model.nbytes(name) for name in model.names]
    report = _report(model, carried)
    low_rank = adapter_bytes(model, carried)
    names = [*_files(model), *(ADAPTER_FILES if carried else ()), *names_beside(source)]
    with begin_with_room(store, source, identity, names, sum(sizes) + low_rank, overwrite) as out:
        if out.complete:
            return report
        records = {file: record for file, (record, _) in out.finished.items()}

        def note(done: TaskResult[FileRecord | None]) -> None:
            record = done.record or done.value
            assert record is not None  # every task writes a file
            records[record.name] = record

        todo = [task for task in _tasks(model, out.ticket, carried) if task.key not in out.finished]
        stage = Stage("restore", restoring_bytes(model) + 2 * low_rank, unit="files", on_cpu=True)
        run_output_stage(pools, stage, todo, note, out)
        ordered = [records[name] for name in sorted(records)]
        if carried:
            ordered.append(store.write_json(ADAPTER_FILES[1], adapter_config(model, carried)))
        finish(out, source, ordered, model.config, report, card_of_restoring(model))
    return report


def _done(model: Model, name: str, carried: Mapping[str, str]) -> tuple[str, str]:
    if not model.is_compressed(name):
        return "copied", "was stored as it is"
    if name in carried:
        return "restored", f"was compressed; its low-rank part is in {ADAPTER_FOLDER}"
    whole = carried and any(model.entries[own].low_rank for own in model.pieces.get(name, [name]))
    return "restored", "was compressed" + ("; whole, as it is no linear layer of its own" if whole else "")


def _report(model: Model, carried: Mapping[str, str]) -> dict[str, Any]:
    rows = []
    for name in model.names:
        done = _done(model, name, carried)
        rows.append({"name": name, "action": done[0], "reason": done[1], "shape": list(model.shape(name))})
    left_out = dict(model.checkpoint.left_out)
    return {"format": "dense", "tensors": rows, "left_out": left_out, "versions": versions(), "argv": redacted_argv()}


def _files(model: Model) -> list[str]:
    """Names of the files of tensors, as many as `_tasks` has tasks for the dense model."""
    layers = {layer_of(name) for name in model.names if model.is_compressed(name)}
    copies = {model.checkpoint.tensors[name].file for name in model.names if not model.is_compressed(name)}
    return tensor_files(len(layers) + len(copies))


def _tasks(model: Model, ticket: Ticket, carried: Mapping[str, str]) -> list[Task[Any]]:
    """A task for each layer that holds compressed tensors, one for each source file that holds others, one for an adapter."""
    layers: dict[str, list[str]] = {}
    copies: dict[str, list[TensorInfo]] = {}
    for name in model.names:
        if model.is_compressed(name):
            layers.setdefault(layer_of(name), []).append(name)
        else:
            info = model.checkpoint.tensors[name]
            copies.setdefault(info.file, []).append(info)
    files = iter(tensor_files(len(layers) + len(copies)))
    location = model.checkpoint.store.root
    tasks: list[Task[Any]] = []
    for layer, names in layers.items():
        file, nbytes = next(files), sum(model.nbytes(name) for name in names)
        job = RestoreTensors(location, tuple(names), frozenset(name for name in names if name in carried))
        tasks.append(Task(file, job, layer, outputs=1, commit_to=Destination(ticket, file), weight=nbytes))
    for infos in copies.values():
        tasks.append(copy_task(model.checkpoint.store, CopyTask(next(files), tuple(infos)), ticket))
    if carried:
        file, nbytes = ADAPTER_FILES[0], adapter_bytes(model, carried)
        low_rank = ExtractLowRank(location, dict(carried))
        tasks.append(
            Task(file, low_rank, "low-rank part", outputs=1, commit_to=Destination(ticket, file), weight=nbytes)
        )
    return tasks
