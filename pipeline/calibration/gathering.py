"""Scheduling of one calibration: which tasks gather shards, add them up and write Hessians, and in which order."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.calibration.hessian_store import (
    SOURCE,
    HessianPart,
    HessianRow,
    StoredHessian,
    require_same_source,
    source_of,
)
from pipeline.calibration.job import AddHessians, GatherHessians, KeepHessians
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.engine.scheduler import TaskList
from pipeline.engine.task import Destination, Task, TaskResult
from pipeline.errors import PayloadLost
from pipeline.models.loading import ModelKey
from pipeline.outputs.transaction import Output
from pipeline.storage.store import Store


@dataclass(frozen=True)
class WindowShards:
    """Token windows, cut into shards of equal size; one task gathers one shard.

    Attributes:
        ids: int64 [windows, seqlen].
        size: windows of a shard; the last shard may have fewer.
        seed: of the tokens that are drawn from the model's predictions.
    """

    ids: np.ndarray
    size: int
    seed: int

    @property
    def starts(self) -> range:
        """Index of the first window of each shard."""
        return range(0, len(self.ids), self.size)

    def shard(self, start: int) -> np.ndarray:
        """Windows of the shard that begins at window `start`, int64 [<= size, seqlen]."""
        return self.ids[start : start + self.size]


@dataclass(frozen=True)
class LayerRange:
    """Layers whose sums are gathered in one pass over the text, as parts."""

    parts: tuple[HessianPart, ...]

    @property
    def names(self) -> list[str]:
        """Matrices of all layers."""
        return [name for part in self.parts for name in part.names]


@dataclass(frozen=True)
class PartPosition:
    """A part, by the index of its range and its index in that range."""

    range_index: int
    part_index: int


@dataclass(frozen=True)
class GatherKey:
    """Key of a task that gathers the shard beginning at window `start` for one range of layers."""

    range_index: int
    start: int


@dataclass(frozen=True)
class AddKey:
    """Key of a task that adds shard number `n_added` to the sum of a part."""

    position: PartPosition
    n_added: int


@dataclass(frozen=True)
class WriteKey:
    """Key of a task that writes the Hessians of a part into its file."""

    file: str


@dataclass
class PartSum:
    """Sum over the shards of one part. Shards are added in the order of the text, each as soon as it is available.

    Attributes:
        total: handle of the sum; None before the first shard.
        adding: whether a task is adding a shard.
        n_added: number of shards in the sum.
        waiting: handles of shards that arrived before their turn, by first window.
    """

    total: Any = None
    adding: bool = False
    n_added: int = 0
    waiting: dict[int, Any] = field(default_factory=dict)

    def replace(self, total: Any) -> None:
        """Store the sum that has one more shard."""
        self.total, self.adding = total, False
        self.n_added += 1


class CalibratedSource:
    """Digests of the bytes of the source that workers have loaded, also those of earlier runs; kept in a file."""

    def __init__(self, store: Store) -> None:
        self._store, self._digests = store, source_of(store)

    def add(self, digests: RangeDigests) -> None:
        """Add what a worker has loaded. Raises StoreError unless all workers have loaded the same bytes."""
        require_same_source(self._store, self._digests, digests)
        if digests.keys() - self._digests.keys():
            self._digests = self._digests | digests
            self._store.write_json(SOURCE, {"ranges": self._digests})


class Gathering:
    """Task source of a calibration. `start_pass` queues the tasks of some ranges; `written` and failures accumulate.

    Attributes:
        written: the Hessians that this run has written.
        lost: tasks of the present pass whose input payload was lost with its node.
    """

    def __init__(self, key: ModelKey, shards: WindowShards, output: Output) -> None:
        """A source without tasks. `output` is the cache directory that this run may write."""
        self.written: list[StoredHessian] = []
        self.lost: list[TaskResult[Any]] = []
        self._key, self._shards, self._output = key, shards, output
        self._ranges: Sequence[LayerRange] = ()
        self._sums: dict[PartPosition, PartSum] = defaultdict(PartSum)
        self._queue: list[Task[Any]] = []
        self._failures: TaskList[Any] = TaskList([], lambda done: None)
        self._source = CalibratedSource(output.store)

    def start_pass(self, ranges: Sequence[LayerRange]) -> int:
        """Queue the tasks that gather `ranges`; returns the number of windows that they gather.

        Tasks that add sums up or write them count as no window: they take next to no time.
        """
        self.lost = []
        self._ranges, self._sums = ranges, defaultdict(PartSum)
        self._queue = [task for index in range(len(ranges)) for task in self._gather_tasks(index)][::-1]
        return sum(task.units for task in self._queue)

    def raise_failures(self) -> None:
        """Raise RunError that names each task that failed or whose input was lost in the last pass."""
        for result in self.lost:
            self._failures.done(result)
        self._failures.raise_failures()

    def next(self, worker: int) -> Task[Any] | None:
        return self._queue.pop() if self._queue else None

    def done(self, done: TaskResult[Any]) -> None:
        if isinstance(done.error, PayloadLost):
            self.lost.append(done)
            return
        if done.error:
            self._failures.done(done)
            return
        key = done.task.key
        if isinstance(key, GatherKey):
            self._receive_shard(key, done)
        elif isinstance(key, AddKey):
            self._sums[key.position].replace(done.payloads[0])
            self._advance(key.position)
        else:
            self._record(key, done.value)

    def _record(self, key: WriteKey, rows: Sequence[HessianRow]) -> None:
        self.written += [StoredHessian(key.file, row) for row in rows]

    def _receive_shard(self, key: GatherKey, done: TaskResult[RangeDigests]) -> None:
        self._source.add(done.value)
        for part_index, payload in enumerate(done.payloads):
            position = PartPosition(key.range_index, part_index)
            self._sums[position].waiting[key.start] = payload
            self._advance(position)

    def _advance(self, position: PartPosition) -> None:
        """Queue the addition of the next shard of a part, or the writing of its file once all shards are added."""
        starts, part = self._shards.starts, self._sums[position]
        if part.total is None and 0 in part.waiting:
            part.replace(part.waiting.pop(0))
        if part.n_added == len(starts):
            self._queue.append(self._write_task(position, self._sums.pop(position).total))
        elif part.n_added and not part.adding and starts[part.n_added] in part.waiting:
            part.adding = True
            pair = (part.total, part.waiting.pop(starts[part.n_added]))
            key = AddKey(position, part.n_added)
            self._queue.append(Task(key, AddHessians(), "sum of Hessians", pair, outputs=1, units=0))

    def _gather_tasks(self, range_index: int) -> list[Task[Any]]:
        parts = tuple(part.names for part in self._ranges[range_index].parts)
        return [
            Task(
                GatherKey(range_index, start),
                GatherHessians(self._key, parts, self._shards.shard(start), start, self._shards.seed),
                f"calibration windows {start} to {start + self._shards.size - 1}",
                outputs=len(parts),
                units=len(self._shards.shard(start)),
            )
            for start in self._shards.starts
        ]

    def _write_task(self, position: PartPosition, total: Any) -> Task[Any]:
        return write_task(self._ranges[position.range_index].parts[position.part_index], total, self._output)


def write_task(part: HessianPart, total: Any, output: Output) -> Task[Any]:
    """Task that writes the Hessians of a part from their sums, whose handle is `total`."""
    return Task(
        WriteKey(part.file),
        KeepHessians(),
        f"Hessians of {part.layer}",
        (total,),
        outputs=1,
        commit_to=Destination(output.ticket, part.file),
        units=0,
    )
