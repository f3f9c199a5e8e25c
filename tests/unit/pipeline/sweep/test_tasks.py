"""The task source of a sweep: order of tasks, release of payloads, and matrices that are lost with a node."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.compression.job import CompressVariants
from pipeline.engine.progress import Progress
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import DiskFull, PayloadLost, RunError
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.storage.store import Store
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run, make_runs
from pipeline.sweep.tasks import SweepTasks, count_tasks, estimated_work
from pipeline.texts.windows import Windows
from swsc_core.compressed.compressed_rtn import RtnEntry

MATRICES = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(2) for role in "qk"]
VARIANTS = [{"name": "q", "bits": 4, "projectors": "q"}, {"name": "q and k", "bits": 4, "projectors": "q,k"}]


@pytest.fixture
def inputs() -> SweepInputs:
    settings = {"models": "m", "variants": VARIANTS, "evaluations": [{"text": "t", "seqlen": 4}], "uncompressed": False}
    tensors = {
        name: TensorInfo(name, "BF16", (64, 64), "model.safetensors", 8192 * place, 8192)
        for place, name in enumerate(MATRICES)
    }
    windows = Windows(np.zeros((2, 4), dtype=np.int64), "t", "0" * 64, 8, "none")
    checkpoint = Checkpoint(Store("/nowhere"), tensors, {"model_type": "llama"})
    return SweepInputs(validated(SweepSettings, settings), [checkpoint], [[windows]])


@pytest.fixture
def runs(inputs: SweepInputs) -> list[Run]:
    return make_runs(inputs.settings, inputs.checkpoints)


@pytest.fixture
def tasks(inputs: SweepInputs, runs: list[Run]) -> Iterator[SweepTasks]:
    with Progress("sweep", count_tasks(inputs, runs), estimated_work(inputs, runs)) as progress:
        yield SweepTasks(inputs, runs, progress)


def result_of(task: Task[Any]) -> TaskResult[Any]:
    """What a worker returns for a task."""
    if isinstance(task.job, MeasureLosses):
        return TaskResult(task, WindowLosses((1.0,) * len(task.job.windows), "float32"))
    assert isinstance(task.job, CompressVariants)
    row = CompressedRow(task.job.info.name, task.job.info.shape)
    entry = RtnEntry.__new__(RtnEntry)  # nothing reads it
    results = tuple(MatrixResult(row, entry) for _ in task.job.variants)
    return TaskResult(task, results, tuple(object() for _ in task.job.variants))


def drain(tasks: SweepTasks) -> list[Task[Any]]:
    """Run all tasks on one worker, in their order."""
    given = []
    while task := tasks.next(0):
        given.append(task)
        tasks.done(result_of(task))
    return given


def test_a_variant_is_evaluated_before_matrices_that_it_does_not_need_are_compressed(tasks: SweepTasks) -> None:
    kinds = [task.kind for task in drain(tasks)]
    assert kinds == ["CompressVariants"] * 2 + ["MeasureLosses"] * 2 + ["CompressVariants"] * 2 + ["MeasureLosses"] * 2


def test_a_unit_of_two_variants_is_compressed_once_and_released_after_the_last_one(
    tasks: SweepTasks, inputs: SweepInputs, runs: list[Run]
) -> None:
    total = count_tasks(inputs, runs)
    given = drain(tasks)
    assert len(given) == total
    assert sum(len(task.job.variants) for task in given if isinstance(task.job, CompressVariants)) == len(MATRICES)
    assert tasks.payloads == {}
    assert [len(run.measurement.losses) for run in runs] == [2, 2]


def test_matrices_that_are_lost_with_a_node_are_recomputed_at_most_twice(tasks: SweepTasks, runs: list[Run]) -> None:
    compressions = 0
    while task := tasks.next(0):
        compressions += isinstance(task.job, CompressVariants)
        lost = not isinstance(task.job, CompressVariants) and task.key.run == 0
        tasks.done(TaskResult(task, error=PayloadLost("lost")) if lost else result_of(task))
    assert runs[0].measurement.error == "lost"
    assert runs[1].measurement.error is None
    assert compressions == 4 + 2 * 2
    assert tasks.payloads == {}


def test_a_failed_compression_ends_its_runs_only(tasks: SweepTasks, runs: list[Run]) -> None:
    while task := tasks.next(0):
        failed = isinstance(task.job, CompressVariants) and "k_proj" in task.job.info.name
        tasks.done(TaskResult(task, error=RunError("no room")) if failed else result_of(task))
    assert [run.measurement.error for run in runs] == [None, "no room"]
    assert tasks.payloads == {}


def test_a_full_disk_ends_all_runs(tasks: SweepTasks) -> None:
    task = tasks.next(0)
    assert task is not None
    with pytest.raises(DiskFull):
        tasks.done(TaskResult(task, error=DiskFull("full")))


def test_the_estimated_work_is_that_of_all_tasks(inputs: SweepInputs, runs: list[Run], tasks: SweepTasks) -> None:
    estimated = estimated_work(inputs, runs)
    given = drain(tasks)
    assert all(task.work > 0 for task in given)
    assert sum(task.work for task in given) == pytest.approx(estimated)
