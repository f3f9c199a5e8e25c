"""The task source of a model in blocks: order of variants, losses, failures, and payloads that are lost with a node."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.blocks.block import Block
from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.runner import BlockKey
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.compression.job import CompressVariants
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.progress import Progress
from pipeline.engine.task import TaskResult
from pipeline.engine.worker import Worker
from pipeline.errors import DiskFull, PayloadLost, RunError, SwscError
from pipeline.evaluation.blocks_job import BlockResult, RunBlock
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model
from pipeline.outputs.report_rows import CompressedRow, MatrixResult
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.storage.store import Store
from pipeline.sweep import block_tasks
from pipeline.sweep.block_tasks import VariantPasses, count_passes, variant_shards
from pipeline.sweep.blocks import BlockedModel
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run, make_runs
from pipeline.sweep.tasks import SweepTasks
from pipeline.texts.windows import Windows
from swsc_core.compressed.compressed_rtn import RtnEntry

MATRICES = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(2) for role in "qk"]
VARIANTS = [{"name": "q", "bits": 4, "projectors": "q"}, {"name": "q and k", "bits": 4, "projectors": "q,k"}]
BLOCKS = (Block(0, 1, 2), Block(1, 2, 2))
LAYOUT = BlockLayout(BLOCKS, 0, WorkerMemory())


class Sweep:
    """A sweep of one model with two blocks and two windows, without workers."""

    def __init__(self) -> None:
        settings = {"models": "m", "variants": VARIANTS, "evaluations": [{"text": "t", "seqlen": 4}]}
        tensors = {
            name: TensorInfo(name, "BF16", (64, 64), "model.safetensors", 8192 * place, 8192)
            for place, name in enumerate(MATRICES)
        }
        checkpoint = Checkpoint(Store("/nowhere"), tensors, {"model_type": "llama"})
        windows = Windows(np.zeros((2, 4), dtype=np.int64), "t", "0" * 64, 8, "none")
        self.inputs = SweepInputs(validated(SweepSettings, settings), [checkpoint], [[windows]])
        self.runs = make_runs(self.inputs.settings, self.inputs.checkpoints)
        numbers = frozenset(run.number for run in self.runs)
        key = BlockKey(ModelKey("/nowhere", "auto", 1), 0)
        self.blocked = BlockedModel(Model(checkpoint, {}), key, LAYOUT, numbers, frozenset({0}), WorkerMemory())
        self.tasks = SweepTasks(self.inputs, self.runs, Progress("sweep", 0, 0), numbers)

    def compress(self) -> int:
        """Compress what is missing, and return the number of matrices."""
        compressed = 0
        while task := self.tasks.next(0):
            assert isinstance(task.job, CompressVariants)
            row, entry = CompressedRow(task.job.info.name, task.job.info.shape), RtnEntry.__new__(RtnEntry)
            results = tuple(MatrixResult(row, entry) for _ in task.job.variants)
            self.tasks.done(TaskResult(task, results, tuple(object() for _ in task.job.variants)))
            compressed += 1
        return compressed

    def evaluate(self, fail: Callable[[RunBlock], SwscError | None] = lambda job: None) -> list[RunBlock]:
        """Run the passes on one worker; `fail` returns the error of a job. Returns the jobs in their order."""
        shards = variant_shards(self.blocked, self.tasks)
        passes = VariantPasses(self.blocked, shards, self.tasks, LocalPool(Worker(1, "cpu")))
        jobs = []
        while task := passes.next(0):
            assert isinstance(task.job, RunBlock)
            jobs.append(task.job)
            error, losses = fail(task.job), (1.0,) * len(task.job.windows) if task.job.block.is_last else ()
            payloads = tuple(object() for _ in range(task.outputs))
            value = BlockResult(losses, "float32", 0, 0)
            passes.done(TaskResult(task, error=error) if error else TaskResult(task, value, payloads))
        passes.require_finished()
        return jobs


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    def by_layer(
        _source: Model, _key: ModelKey, blocks: Sequence[Block], matrices: Sequence[str]
    ) -> list[tuple[str, ...]]:
        return [tuple(name for name in matrices if f"layers.{block.start}." in name) for block in blocks]

    monkeypatch.setattr(block_tasks, "matrices_of_blocks", by_layer)
    return Sweep()


def losses_of(runs: list[Run]) -> list[int]:
    return [len(run.measurement.losses) for run in runs]


def test_a_block_serves_one_variant_after_the_other_with_its_own_matrices_only(sweep: Sweep) -> None:
    assert sweep.compress() == len(MATRICES)
    jobs = sweep.evaluate()
    order = [(job.block, job.variant) for job in jobs]
    assert order == [(block, name) for block in BLOCKS for name in ("", "q", "q and k") for _ in range(2)]
    assert all(f"layers.{job.block.start}." in name for job in jobs for name in job.names)
    assert [len(job.names) for job in jobs if job.block.is_last] == [0, 0, 1, 1, 2, 2]
    assert len(jobs) == count_passes(sweep.blocked, sweep.inputs, sweep.runs)


def test_compressed_matrices_stay_until_the_last_variant_is_measured(sweep: Sweep) -> None:
    sweep.compress()
    assert len(sweep.tasks.payloads) == len(MATRICES)
    sweep.evaluate()
    assert losses_of(sweep.runs) == [2, 2, 2]
    assert sweep.tasks.payloads == {}
    assert not sweep.tasks.evaluable(sweep.blocked.runs)


def test_a_variant_that_fails_ends_alone(sweep: Sweep) -> None:
    sweep.compress()
    jobs = sweep.evaluate(lambda job: RunError("no luck") if job.variant == "q" else None)
    assert [run.measurement.error for run in sweep.runs] == [None, "no luck", None]
    assert losses_of(sweep.runs) == [2, 0, 2]
    assert sum(job.variant == "q" for job in jobs) == 1
    assert sweep.tasks.payloads == {}


def test_a_variant_whose_compression_failed_is_not_evaluated(sweep: Sweep) -> None:
    while task := sweep.tasks.next(0):
        sweep.tasks.done(TaskResult(task, error=RunError("no room")))
    assert {job.variant for job in sweep.evaluate()} == {""}
    assert [run.measurement.error for run in sweep.runs] == [None, "no room", "no room"]


def test_lost_hidden_states_are_computed_again_by_the_block_before(sweep: Sweep) -> None:
    sweep.compress()
    lost = iter([PayloadLost("lost")])
    jobs = sweep.evaluate(lambda job: next(lost, None) if job.block.is_last else None)
    assert losses_of(sweep.runs) == [2, 2, 2]
    assert len(jobs) == 12 + 2
    assert sweep.compress() == 0


def test_lost_matrices_are_compressed_again_at_most_twice(sweep: Sweep) -> None:
    for matrices in (4, 2, 2):
        assert sweep.compress() == matrices
        sweep.evaluate(lambda job: PayloadLost("lost") if job.variant == "q" else None)
    assert [run.measurement.error for run in sweep.runs] == [None, "lost", None]
    assert sweep.compress() == 0
    assert sweep.tasks.payloads == {}


def test_a_full_disk_ends_all_runs(sweep: Sweep) -> None:
    sweep.compress()
    with pytest.raises(DiskFull):
        sweep.evaluate(lambda job: DiskFull("full"))
