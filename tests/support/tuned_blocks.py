"""A tuning of a tiny compressed model, by workers in this process that hold whole models or blocks of layers."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pipeline.blocks.block import Block, partition
from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.twin import require_blocks
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import commit
from pipeline.device import Arithmetic
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.stage import Room, Stage
from pipeline.engine.task import Task, TaskResult, as_swsc_error
from pipeline.engine.worker import Worker
from pipeline.models.loading import ModelKey, meta_model
from pipeline.settings.calibration import CalibrationSettings
from pipeline.tuning import blocks_flow
from pipeline.tuning.flow import Tuning
from pipeline.tuning.windows import TuningWindows

# 10 windows of 24 tokens, one of which is held out
WINDOWS = TuningWindows(np.random.default_rng(0).integers(1, 250, (10, 24)), epochs=1, seed=0)


@dataclass
class SeveralWorkers:
    """A pool of workers in this process. Tasks that were started later end first."""

    workers: list[Worker]
    tasks: list[str] = field(default_factory=list)
    _running: list[tuple[int, Task[Any]]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.workers)

    def idle(self) -> list[int]:
        busy = {worker for worker, _ in self._running}
        return [worker for worker in range(self.size) if worker not in busy]

    def start(self, worker: int, task: Task[Any]) -> None:
        self._running.append((worker, task))
        self.tasks.append(task.kind)

    def wait(self) -> TaskResult[Any] | None:
        worker, task = self._running.pop()
        try:
            output = self.workers[worker].run(task.job, *task.payloads)
        except Exception as error:
            return TaskResult(task, error=as_swsc_error(error, task.label), worker=worker)
        if not task.commit_to:
            return TaskResult(task, output.value, output.payloads, worker=worker)
        record = commit(task.commit_to.ticket, task.commit_to.file, output.payloads[0])
        return TaskResult(task, output.value, record=record, worker=worker)

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None:
        self._running.clear()


@dataclass
class InProcess:
    """`Pools` of `n_workers` workers in this process, each of which may hold `nbytes` bytes."""

    n_workers: int
    nbytes: int
    pool: Any = SeveralWorkers
    used: list[Any] = field(default_factory=list)
    in_process: bool = True

    def __call__(self, tasks: int, stage: Stage) -> Any:
        self.used.append(self.pool([Worker(1, "cpu") for _ in range(self.n_workers)]))
        return self.used[-1]

    def require_workers(self, stage: Stage) -> None:
        """No-op."""

    def room(self) -> Room:
        return Room("cpu", self.nbytes)

    def release(self) -> None:
        """No-op."""


def tuning(original: Path, compressed: Path, cache: Path, dtype: str = "float32") -> Tuning:
    """A tuning over `WINDOWS`."""
    settings = CalibrationSettings(calibration_dtype=dtype)
    return Tuning(open_checkpoint(str(original)), str(compressed), WINDOWS, settings, str(cache), Arithmetic(1))


def tune_whole(tuned: Tuning) -> dict[str, bytes]:
    """Tune by workers that hold both models."""
    tuned.run(InProcess(1, 1 << 40))
    return results(tuned)


def tune_in_blocks(tuned: Tuning, size: int, pools: InProcess) -> dict[str, bytes]:
    """Tune in blocks of `size` layers; 0: embedding, head and each layer are blocks of their own."""

    def layout(_room: Room, key: ModelKey, _sizes: Any, _working: int) -> BlockLayout:
        return _layout(key.location, size)

    with mock.patch.object(blocks_flow, "layout_within", layout):
        tuned.run(pools)
    return results(tuned)


def results(tuned: Tuning) -> dict[str, bytes]:
    """The last state and the report of a finished tuning, and whatever else is in its folder."""
    return {path.name: path.read_bytes() for path in Path(tuned.store.root).iterdir() if path.is_file()}


@cache
def _layout(location: str, size: int) -> BlockLayout:
    model = meta_model(ModelKey(location, "float32", 1))
    count = model.config.get_text_config().num_hidden_layers
    blocks = tuple(Block(start, min(start + size, count), count) for start in range(0, count, max(1, size)))
    blocks = blocks if size else partition([1] * (count + 2), 0)
    return BlockLayout(blocks, require_blocks(type(model), model.config, blocks, location), WorkerMemory())
