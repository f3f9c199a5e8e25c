"""The stages of a command that write the files of an output, and that hash those of an earlier run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import JobContext, JobOutput, Task, TaskResult
from pipeline.errors import ClusterError, UncompressibleWeight
from pipeline.outputs.existing_output import FileCheck, check_in_threads
from pipeline.outputs.transaction import Output, abandon
from pipeline.planning.memory import WORKER_BASE
from pipeline.storage.store import FileRecord, Store

# Bytes that the driver hashes itself, because starting workers takes longer.
_HASHED_BY_DRIVER = 1 << 30

V = TypeVar("V")


@dataclass(frozen=True)
class CheckFile:
    """Differences between a file of an output and its record, one sentence each."""

    store: Store
    file: str
    record: FileRecord

    def run(self, context: JobContext) -> JobOutput[list[str]]:
        return JobOutput(file_differences(self.store, self.file, self.record.to_json()))


def run_check_stage(pools: Pools, name: str, store: Store, records: Mapping[str, FileRecord]) -> dict[str, list[str]]:
    """Hash files on the workers as the stage `name`, and return the differences of each file from its record."""
    differences: dict[str, list[str]] = {}

    def note(done: TaskResult[list[str]]) -> None:
        differences[done.task.key] = done.value

    tasks = [
        Task(file, CheckFile(store, file, record), file, work=record.size, nbytes=record.size)
        for file, record in sorted(records.items(), key=lambda item: -item[1].size)
    ]
    run_stage(pools, Stage(name, WORKER_BASE, unit="files", on_cpu=True), tasks, note)
    return differences


def check_on(pools: Pools) -> FileCheck:
    """A `FileCheck` that hashes files on the workers if there are many bytes, and workers besides this process."""

    def check(store: Store, records: Mapping[str, FileRecord]) -> Mapping[str, list[str]]:
        if pools.in_process or sum(record.size for record in records.values()) < _HASHED_BY_DRIVER:
            return check_in_threads(store, records)
        differences = run_check_stage(pools, "check finished files", store, records)
        # The driver confirms what workers find damaged, because a node may not see the directory.
        damaged = {file: record for file, record in records.items() if differences[file]}
        return {**differences, **check_in_threads(store, damaged)}

    return check


def run_output_stage(
    pools: Pools, stage: Stage, tasks: list[Task[V]], on_result: Callable[[TaskResult[V]], None], output: Output
) -> None:
    """Run the tasks that write an output.

    The output is abandoned if a weight turns out to be uncompressible, or if the cluster cannot run the tasks and no
    file is finished. With finished files it is kept, because the failure may come from a node that was added late.
    """
    try:
        run_stage(pools, stage, tasks, on_result)
    except UncompressibleWeight:
        abandon(output)
        raise
    except ClusterError:
        if not output.store.below(FINISHED_FOLDER).names():
            abandon(output)
        raise
