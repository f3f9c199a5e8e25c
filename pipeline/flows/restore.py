"""A compressed model directory in, a plain dense one out, which stock loaders open."""

import sys
from typing import Any

from pipeline.errors import ConfigError
from pipeline.flows.card import card_of_restoring
from pipeline.flows.compress import PoolMaker, run_tasks, versions
from pipeline.flows.preflight import ALGORITHM, begin_with_room, require_apart
from pipeline.model.artifact import Model, open_model
from pipeline.model.families import layer_of
from pipeline.model.forecast import restoring_bytes
from pipeline.model.lease import Ticket
from pipeline.model.output import finish
from pipeline.model.plan import CopyTask
from pipeline.model.store import FileRecord, Store
from pipeline.model.tensors import TensorInfo
from pipeline.run.pool import Done, Task


def restore_model(location: str, output: str, make_pool: PoolMaker, overwrite: bool = False) -> dict[str, Any]:
    """Restore every compressed tensor of the model at `location` and copy the others, shard by shard.

    Raises:
        ConfigError: the model is not compressed.
        OutputError: the directory holds something else, another run writes there, or the disk has not enough room.
    """
    model = open_model(location)
    if not model.entries:
        raise ConfigError(f"{location}: not a swsc model, nothing to restore; use it as it is")
    store, source = Store.at(output), model.checkpoint
    require_apart(source, store)
    identity = {"restored_from": source.fingerprint, "algorithm": ALGORITHM}
    sizes = [model.nbytes(name) for name in model.names]
    report = _report(model)
    with begin_with_room(store, identity, sum(sizes), overwrite) as out:
        if out.complete:
            return report
        records = {file: record for file, (record, _) in out.finished.items()}

        def note(done: Done) -> None:
            record: FileRecord = done.record or done.value
            records[record.name] = record

        todo = [task for task in _tasks(model, location, out.ticket) if task.key not in out.finished]
        memory = restoring_bytes(max(model.count(name) for name in model.names if model.is_compressed(name)))
        run_tasks(todo, memory, note, make_pool, out, "restore")
        finish(out, source, [records[name] for name in sorted(records)], model.config, report, card_of_restoring(model))
    return report


def _report(model: Model) -> dict[str, Any]:
    rows = []
    for name in model.names:
        done = ("restored", "was compressed") if model.is_compressed(name) else ("copied", "was stored as it is")
        rows.append({"name": name, "action": done[0], "reason": done[1], "shape": list(model.shape(name))})
    return {"format": "dense", "tensors": rows, "versions": versions(), "argv": sys.argv}


def _tasks(model: Model, location: str, ticket: Ticket) -> list[Task]:
    """A task for each layer that holds compressed tensors, and one for each source file that holds others."""
    layers: dict[str, list[str]] = {}
    copies: dict[str, list[TensorInfo]] = {}
    for name in model.names:
        if model.is_compressed(name):
            layers.setdefault(layer_of(name), []).append(name)
        else:
            info = model.checkpoint.tensors[name]
            copies.setdefault(info.file, []).append(info)
    total = len(layers) + len(copies)
    files = (f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    tasks = []
    for layer, names in layers.items():
        file, nbytes = next(files), sum(model.nbytes(name) for name in names)
        tasks.append(
            Task(file, "restore", (location, names), label=layer, outputs=1, commit_to=(ticket, file), weight=nbytes)
        )
    for infos in copies.values():
        copy = CopyTask(next(files), tuple(infos))
        arguments = (model.checkpoint.store, copy, ticket)
        tasks.append(Task(copy.file, "copy", arguments, label=f"copy to {copy.file}", weight=copy.nbytes))
    return tasks
