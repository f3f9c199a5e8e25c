"""Second moments of a model on a text, gathered over the workers and kept for every later run of the same model and text.

The text is cut into shards of a fixed number of windows; a task gathers one shard for one range of layers, another adds
up the shards of one matrix in their order. Nothing depends on who did what, and memory is bounded by the range.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import CalibrationSettings
from pipeline.flows.compress import PoolMaker
from pipeline.measure.perplexity import ModelKey
from pipeline.model.artifact import begin
from pipeline.model.checkpoint import Checkpoint, TensorInfo
from pipeline.model.forecast import calibration_bytes
from pipeline.model.moments import Moments, layers_of, moment_file
from pipeline.model.store import Store
from pipeline.run.driver import TaskList, execute
from pipeline.run.pool import Done, Task
from pipeline.run.progress import Progress

_SHARD_TOKENS = 8192  # tokens of one task
_VERSION = 2  # goes up with every change of what is gathered


@dataclass(frozen=True)
class _Range:
    """Layers whose moments fit the memory that is allowed, and the matrices of each."""

    layers: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        return [name for names in self.layers.values() for name in names]


class Calibration:
    """Deals out the gathering of moments, and their addition as soon as all shards of a range are there."""

    def __init__(
        self, source: Checkpoint, infos: Sequence[TensorInfo], ids: np.ndarray, settings: CalibrationSettings, cache: str,
        seed: int,
    ) -> None:  # fmt: skip
        """Begin, or go on with, a calibration.

        Args:
            infos: the matrices whose moments are wanted.
            ids: int64 [windows, seqlen], the tokens.
            cache: directory that all nodes see.
            seed: of the run.
        """
        self._source, self._ids, self._settings, self._seed = source, ids, settings, seed
        self._infos = {info.name: info for info in infos}
        identity = self._identity()
        digest = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
        self.store = Store.at(f"{cache}/moments-{digest}")
        self._out = begin(self.store, identity)
        self._payloads: dict[int, dict[int, tuple[Any, ...]]] = defaultdict(dict)
        self._ranges = self._cut()

    def _identity(self) -> dict[str, Any]:
        ids = hashlib.sha256(self._ids.tobytes()).hexdigest()
        about = {"source": self._source.fingerprint, "ids": ids, "windows": list(self._ids.shape)}
        return about | {"version": _VERSION, "seed": self._seed, "dtype": self._settings.calibration_dtype}

    def _cut(self) -> list[_Range]:
        """Layers with matrices that have no moments yet, in ranges of bounded bytes; a layer is never cut."""
        ranges: list[_Range] = []
        room = 0
        missing = [name for name in self._infos if moment_file(name) not in self._out.finished]
        for layer, names in layers_of(missing).items():
            nbytes = self._sum_bytes(names)
            if not ranges or nbytes > room:
                ranges.append(_Range({}))
                room = int(self._settings.moment_gib * 2**30)
            ranges[-1].layers[layer] = names
            room -= nbytes
        return ranges

    def _sum_bytes(self, names: Sequence[str]) -> int:
        """Bytes of the sums of some matrices: a weighted moment each, and a plain one for every two."""
        return sum(6 * self._infos[name].shape[1] ** 2 for name in names)

    def run(self, make_pool: PoolMaker) -> Moments:
        """Gather what is not there yet.

        Raises:
            RunError: tasks failed; finished matrices are kept.
        """
        tasks = [task for index in range(len(self._ranges)) for task in self._gathering(index)]
        self._queue: list[Task] = tasks[::-1]
        self._failures = TaskList([], lambda done: None)
        if tasks:
            widest = max(self._sum_bytes(part.names) for part in self._ranges)
            pool = make_pool(len(tasks), calibration_bytes(self._source, self._ids.shape[1], widest))
            try:
                additions = sum(len(part.names) for part in self._ranges)
                with Progress("calibrate", len(tasks) + additions, 0, "tasks") as progress:
                    execute(pool, self, progress)
            finally:
                pool.close()
        self._failures.raise_failures()
        return Moments(self.store, self._settings.gradient_share)

    def _gathering(self, index: int) -> list[Task]:
        part, ids = self._ranges[index], self._ids
        size = max(1, _SHARD_TOKENS // ids.shape[1])
        key = ModelKey(self._source.store.root, self._settings.calibration_dtype, 1)
        return [
            Task(
                ("gather", index, start), "calibrate",
                (key, tuple(map(tuple, part.layers.values())), ids[start : start + size], start, self._seed),
                label=f"calibration windows {start} to {start + size - 1}", outputs=len(part.layers),
            )
            for start in range(0, len(ids), size)
        ]  # fmt: skip

    def next(self, worker: int) -> Task | None:
        return self._queue.pop() if self._queue else None

    def done(self, done: Done) -> None:
        if done.error:
            self._failures.done(done)
            return
        kind, index, start = done.task.key
        if kind == "add":
            return
        shards = self._payloads[index]
        shards[start] = done.payloads
        size = max(1, _SHARD_TOKENS // self._ids.shape[1])
        if len(shards) == math.ceil(len(self._ids) / size):
            self._queue += self._additions(index, self._payloads.pop(index))

    def _additions(self, index: int, shards: dict[int, tuple[Any, ...]]) -> list[Task]:
        ordered = [shards[start] for start in sorted(shards)]
        return [
            Task(
                ("add", index, name), "add_moments", (name,), label=f"moments of {name}", outputs=1,
                payloads=tuple(payloads[place] for payloads in ordered), commit_to=(self.store.root, moment_file(name)),
            )
            for place, names in enumerate(self._ranges[index].layers.values())
            for name in names
        ]  # fmt: skip
