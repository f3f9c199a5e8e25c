"""Second moments of a model on a text, gathered over the workers and kept for every later run of the same model and text.

The text is cut into shards of a fixed number of windows; a task gathers one shard for one range of layers, others add the
shards of a layer up in their order, each as soon as it is there. Nothing depends on who did what, and memory is bounded by the range.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.calibration.hessian_store import SOURCE, Hessians, hessian_file, layers_of, require_same_source, source_of
from pipeline.calibration.job import AddHessians, ExtractHessian, GatherHessians
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.device import Arithmetic
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.engine.task import Destination, Task, TaskResult
from pipeline.errors import PayloadLost
from pipeline.models.loading import ModelKey
from pipeline.outputs.transaction import begin
from pipeline.planning.cost_model import calibration_bytes, calibration_device_bytes, hessian_bytes
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage.cache_key import cache_name, versioned, windows_identity
from pipeline.storage.records import report_damaged_cache
from pipeline.storage.store import Store, require_free_space

_SHARD_TOKENS = 8192  # tokens of one task
_GATHERINGS = 3  # of a layer whose sums were lost with a node
_CPU = Arithmetic(1)


def calibration_key(source: Checkpoint, settings: CalibrationSettings) -> ModelKey:
    """How workers name the model that they calibrate."""
    known = digests_of_source(source)
    return ModelKey(source.store.root, settings.calibration_dtype, 1, settings.trust_remote_code, known)


@dataclass(frozen=True)
class _Range:
    """Layers whose moments fit the memory that is allowed, and the matrices of each."""

    layers: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        return [name for names in self.layers.values() for name in names]


@dataclass
class _Fold:
    """The sum over the shards of one layer so far: they are added in their order, each as soon as it is there.

    Attributes:
        total: handle of the sum. busy: a task is adding to it. added: shards in it. shards: those that wait, by first window.
    """

    total: Any = None
    busy: bool = False
    added: int = 0
    shards: dict[int, Any] = field(default_factory=dict)

    def take(self, total: Any) -> None:
        self.total, self.busy = total, False
        self.added += 1


class Calibration:
    """Deals out the gathering of moments, and their addition as soon as all shards of a range are there."""

    def __init__(
        self, source: Checkpoint, infos: Sequence[MatrixInfo], ids: np.ndarray, settings: CalibrationSettings, cache: str,
        seed: int, arithmetic: Arithmetic = _CPU,
    ) -> None:  # fmt: skip
        """A calibration that `run` begins, or goes on with.

        Args:
            infos: the matrices whose moments are wanted.
            ids: int64 [windows, seqlen], the tokens.
            cache: directory that all nodes see.
            seed: of the run.
            arithmetic: of the workers; moments of one kind of GPU are not those of another.
        """
        self._source, self._ids, self._settings, self._seed = source, ids, settings, seed
        self._arithmetic = arithmetic
        self._infos = {info.name: info for info in infos}
        self.store = Store.at(f"{cache}/{cache_name('moments', self._identity())}")
        self._starts = range(0, len(ids), max(1, _SHARD_TOKENS // ids.shape[1]))  # first window of each shard
        self._folds: dict[tuple[int, int], _Fold] = defaultdict(_Fold)  # (range, place of a layer in it)
        self._written: set[str] = set()  # matrices that this run has finished

    def _identity(self) -> dict[str, Any]:
        about = {"source": self._source.fingerprint, "seed": self._seed, "dtype": self._settings.calibration_dtype}
        return versioned("moments", about | windows_identity(self._ids) | self._arithmetic.gpu_identity)

    def _cut(self) -> list[_Range]:
        """Layers with matrices that have no moments yet, in ranges of bounded bytes; a layer is never cut."""
        ranges: list[_Range] = []
        room = 0
        missing = [name for name in self._infos if name not in self._written and not self._is_found(name)]
        for layer, names in layers_of(missing).items():
            nbytes = self._sum_bytes(names)
            if not ranges or nbytes > room:
                ranges.append(_Range({}))
                room = int(self._settings.moment_gib * 2**30)
            ranges[-1].layers[layer] = names
            room -= nbytes
        return ranges

    def _is_found(self, name: str) -> bool:
        """Whether an earlier run wrote the moments of a matrix, and those of the one that has its `plain`.

        A run that was cut short may have left the one without the other, and this run may not want the other.
        """
        owner = self._owner(name)
        return owner is not None and self._owner(owner) == owner

    def _owner(self, name: str) -> str | None:
        _, rows = self._out.finished.get(hessian_file(name), (None, [{"owner": None}]))
        owner: str | None = rows[0]["owner"]
        return owner

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return hessian_bytes(self._infos[name] for name in names)

    def run(self, pools: Pools) -> Hessians:
        """Gather what is not there yet.

        Raises:
            RunError: tasks failed; finished matrices are kept.
        """
        with report_damaged_cache(self.store):
            names = map(hessian_file, self._infos)
            self._out = begin(self.store, self._identity(), on_wait=log_and_release(pools), names=names)
        with self._out:
            self._read = source_of(self.store)  # digests of what workers have loaded
            self._ranges = self._cut()
            self._gather(pools)
        return Hessians(self.store, self._settings.gradient_share)

    def _gather(self, pools: Pools) -> None:
        self._failures: TaskList[Any] = TaskList([], lambda done: None)
        if not self._ranges:
            return
        require_free_space(self.store, sum(self._sum_bytes(part.names) for part in self._ranges))
        widest = max(self._sum_bytes(part.names) for part in self._ranges)
        tasks = len(self._ranges) * len(self._starts)
        length, dtype = self._ids.shape[1], self._settings.calibration_dtype
        on_gpu = calibration_device_bytes(self._source, length, widest, dtype)
        stage = Stage("calibrate", calibration_bytes(self._source, length, widest), on_gpu, keeps_model=True)
        pool = pools(tasks, stage)
        try:
            with Progress(stage.name, self._total_tasks, 0, stage.unit) as progress:
                for _ in range(_GATHERINGS):
                    self._lost: list[TaskResult[Any]] = []
                    self._queue = [task for index in range(len(self._ranges)) for task in self._gathering(index)][::-1]
                    execute(pool, self, progress)
                    if not self._lost:
                        break
                    self._ranges, self._folds = self._cut(), defaultdict(_Fold)
                    progress.log(f"{self._lost[0].error}; layers that are not finished are gathered again")
                    progress.add(self._total_tasks)
        finally:
            pool.close()
        for lost in self._lost:
            self._failures.done(lost)
        self._failures.raise_failures()

    @property
    def _total_tasks(self) -> int:
        """Gathering, adding and writing."""
        shards = len(self._starts)
        return sum(shards + (shards - 1) * len(part.layers) + len(part.names) for part in self._ranges)

    def _gathering(self, index: int) -> list[Task[Any]]:
        part, ids, size = self._ranges[index], self._ids, self._starts.step
        key = calibration_key(self._source, self._settings)
        layers = tuple(map(tuple, part.layers.values()))
        return [
            Task(
                ("gather", index, start), GatherHessians(key, layers, ids[start : start + size], start, self._seed),
                f"calibration windows {start} to {start + size - 1}", outputs=len(part.layers),
            )
            for start in self._starts
        ]  # fmt: skip

    def next(self, worker: int) -> Task[Any] | None:
        return self._queue.pop() if self._queue else None

    def done(self, done: TaskResult[Any]) -> None:
        if isinstance(done.error, PayloadLost):
            self._lost.append(done)
            return
        if done.error:
            self._failures.done(done)
            return
        kind, index, *rest = done.task.key
        if kind == "write":
            self._written.add(rest[0])
        if kind == "gather":
            self._note_source(done.value)
            for place, payload in enumerate(done.payloads):
                self._folds[index, place].shards[rest[0]] = payload
                self._go_on(index, place)
        elif kind == "fold":
            self._folds[index, rest[0]].take(done.payloads[0])
            self._go_on(index, rest[0])

    def _note_source(self, read: RangeDigests) -> None:
        """All workers, and those of earlier runs, must have loaded the same bytes; raises StoreError."""
        require_same_source(self.store, self._read, read)
        if read.keys() - self._read.keys():
            self._read = self._read | read
            self.store.write_json(SOURCE, {"ranges": self._read})

    def _go_on(self, index: int, place: int) -> None:
        """Add the next shard to the sum of one layer if it is there; once all are in it, write its matrices."""
        fold = self._folds[index, place]
        if fold.total is None and 0 in fold.shards:
            fold.take(fold.shards.pop(0))
        if fold.added == len(self._starts):
            self._queue += self._writings(index, place, self._folds.pop((index, place)).total)
        elif not fold.busy and self._starts[fold.added] in fold.shards and fold.added:
            fold.busy = True
            key = ("fold", index, place, fold.added)
            pair = (fold.total, fold.shards.pop(self._starts[fold.added]))
            self._queue.append(Task(key, AddHessians(), "sum of Hessians", pair, outputs=1))

    def _writings(self, index: int, place: int, total: Any) -> list[Task[Any]]:
        names = list(self._ranges[index].layers.values())[place]
        return [
            Task(
                ("write", index, name), ExtractHessian(name), f"moments of {name}", (total,), outputs=1,
                commit_to=Destination(self._out.ticket, hessian_file(name)),
            )
            for name in names
        ]  # fmt: skip
