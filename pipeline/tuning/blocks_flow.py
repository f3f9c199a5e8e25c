"""Tuning of models that do not fit a worker: windows pass through blocks, each with values and gradients of its own.

The hidden states of the original model after its last layer are computed once and written to files, from which a
resumed run reads them. A worker keeps its block from step to step, if there are as many workers as blocks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.blocks.block import Block
from pipeline.blocks.layout import BlockLayout, LayerSizes, layout_within
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import Station, backward_stations, forward_stations
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.engine.memory import Room, WorkerMemory
from pipeline.engine.stage import Stage
from pipeline.engine.task import Destination, Job, Pool, Task, TaskResult
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.transaction import Output
from pipeline.planning.memory import block_gradient_memory, layer_activation_bytes
from pipeline.tuning.blocks_job import (
    BlockTuneKey,
    BlockValues,
    StudentBackward,
    StudentDivergence,
    StudentForward,
    TeacherForward,
    WindowOfTuning,
)
from pipeline.tuning.job import Divergence
from pipeline.tuning.passes import Run, State, Sweep
from pipeline.tuning.tuner import TuneKey

# Bytes of a label, and of a weight of the largest matrix while its gradient is projected onto stored values.
_LABEL, _PROJECTED = 4, 16


@dataclass(frozen=True)
class BlockTuning:
    """What is tuned in which blocks.

    Attributes:
        names: compressed matrices of each unit of the model.
        working: what a worker needs besides a block.
    """

    key: BlockTuneKey
    layout: BlockLayout
    names: Mapping[int, Sequence[str]]
    working: WorkerMemory

    @classmethod
    def within(cls, room: Room, source: Checkpoint, key: TuneKey, seqlen: int) -> "BlockTuning":
        """The fewest blocks that fit a worker.

        Raises:
            ClusterError: not even the largest layer fits.
            BlocksUnsupported: the model cannot run in blocks, or a matrix is in none.
        """
        unknown_length, student, original = BlockTuneKey(key, 0), open_model(key.compressed), Model(source, {})
        teacher_sizes = LayerSizes.of(original, unknown_length.teacher.model, room.kind)
        sizes = LayerSizes.of(student, unknown_length.student.model, room.kind)
        names = _names_by_unit(student, sizes)
        extra = dict.fromkeys(range(len(sizes.values)), layer_activation_bytes(original, seqlen))
        for unit, matrices in names.items():
            extra[unit] += _LABEL * sum(student.entries[name].n_labels for name in matrices)
        extra[len(sizes.values) - 1] += teacher_sizes.values[-1]  # both heads are loaded at the same time
        largest = max(entry.shape[0] * entry.shape[1] for entry in student.entries.values())
        projected = WorkerMemory(_PROJECTED * largest, 0, _PROJECTED * largest)
        working = block_gradient_memory(original, seqlen, 1) + projected
        sizes = sizes.plus(extra).at_least(teacher_sizes)
        layout = layout_within(room, unknown_length.teacher.model, sizes, working)
        return cls(BlockTuneKey(key, layout.tuple_length), layout, names, working)

    @property
    def stage(self) -> Stage:
        """The stage of a pool whose workers hold one block each."""
        return Stage("tune", self.working + self.layout.weights)

    @property
    def teacher_blocks(self) -> list[Block]:
        """The blocks of the original model up to the last layer."""
        blocks = (block.without_head for block in self.layout.blocks)
        return [block for block in blocks if block.units]

    def names_of(self, block: Block) -> tuple[str, ...]:
        """Compressed matrices of a block."""
        return tuple(name for unit in block.units for name in self.names.get(unit, ()))

    def stations(self, backward: bool) -> tuple[Station, ...]:
        """The passes of a window; the backward pass ends with the first block that has matrices."""
        blocks = self.layout.blocks
        if not backward:
            return forward_stations(blocks)
        end = next(number for number, block in enumerate(blocks) if self.names_of(block))
        return backward_stations(blocks, adds=False)[: 2 * len(blocks) - 1 - end]


class BlockPasses:
    """Passes by workers that hold blocks (`passes.Passes`)."""

    def __init__(self, tuning: BlockTuning, ids: np.ndarray, output: Output) -> None:
        """`ids`: all windows, int64 [windows, seqlen]. `output`: the cache directory that this run may write."""
        self.tuning, self.stage = tuning, tuning.stage
        self.tuned_blocks = [block for block in tuning.layout.blocks if tuning.names_of(block)]
        self.parts = [tuning.names_of(block) for block in self.tuned_blocks]
        self._ids, self._output = ids, output
        self._written = {file for file in teacher_files(len(ids)) if file in output.finished}
        self._pool: Pool | None = None
        self._last: BlockSchedule | None = None

    def n_workers(self, batch_size: int) -> int:
        return len(self.tuning.layout.blocks)

    @property
    def n_preparing(self) -> int:
        return len(self._missing) * len(self.tuning.teacher_blocks)

    def n_tasks(self, windows: int, backward: bool) -> int:
        return windows * len(self.tuning.stations(backward))

    def prepare(self, pool: Pool, run: Run) -> None:
        """Compute and write the hidden states of the original model that no earlier run has written."""
        self._pool, self._last = pool, None
        missing = self._missing
        stations = forward_stations(self.tuning.teacher_blocks)

        def make_task(step: Pass, inputs: tuple[Any, ...]) -> Task[None]:
            number, block = missing[step.shard], stations[step.station].block
            job = TeacherForward(self.tuning.key.teacher, block, self._ids[[number]], step.upcoming)
            is_end = step.station == len(stations) - 1
            target = Destination(self._output.ticket, teacher_file(number)) if is_end else None
            return Task(step, job, f"original model, {block}, window {number}", inputs, outputs=1, commit_to=target)

        def on_done(step: Pass, result: TaskResult[None]) -> None:
            if result.record:
                self._written.add(result.record.name)

        schedule = BlockSchedule(stations, len(missing), lambda: pool.size, make_task, on_done)
        run(schedule)
        schedule.require_finished()

    def sweep(self, step: int, windows: Sequence[int], state: State, backward: bool) -> Sweep:
        sweep = _BlockSweep(self, step, windows, state, backward)
        self._last = sweep.schedule
        return sweep

    @property
    def _missing(self) -> list[int]:
        """Windows for which the hidden states of the original model are not in a file."""
        return [number for number, file in enumerate(teacher_files(len(self._ids))) if file not in self._written]

    def window(self, number: int) -> WindowOfTuning:
        """A window by its number."""
        return WindowOfTuning(self._ids[[number]], self._output.store, teacher_file(number))

    def n_workers_now(self) -> int:
        """Number of workers of the pool."""
        assert self._pool is not None
        return self._pool.size

    def held_now(self) -> dict[int, Block]:
        """Worker -> the block that it holds since the last sweep; no task is under way. Lost workers are left out."""
        assert self._pool is not None
        held = self._last.held if self._last else {}
        return {worker: held[worker] for worker in self._pool.idle() if worker in held}


class _BlockSweep:
    """Passes of some windows through all blocks.

    Attributes:
        schedule: of its tasks.
    """

    def __init__(self, passes: BlockPasses, step: int, windows: Sequence[int], state: State, backward: bool) -> None:
        self._passes, self._tuning, self._windows = passes, passes.tuning, windows
        self._step, self._backward = step, backward
        self._states = dict(zip(passes.tuned_blocks, state, strict=bool(state)))
        self._stations = self._tuning.stations(backward)
        self._divergences: dict[int, Divergence] = {}
        # Block -> shard -> handle of the gradients of its values.
        self._gradients: dict[Block, dict[int, Any]] = defaultdict(dict)
        self.schedule = BlockSchedule(
            self._stations, len(windows), passes.n_workers_now, self._task, self._on_pass, passes.held_now()
        )

    def next(self, worker: int) -> Task[Any] | None:
        return self.schedule.next(worker)

    def done(self, result: TaskResult[Any]) -> None:
        self.schedule.done(result)

    @property
    def divergences(self) -> list[Divergence]:
        self.schedule.require_finished()
        return [self._divergences[shard] for shard in range(len(self._windows))]

    def gradients(self, part: int) -> list[Any]:
        handles = self._gradients[self._passes.tuned_blocks[part]]
        return [handles[shard] for shard in range(len(self._windows))]

    def _task(self, step: Pass, inputs: tuple[Any, ...]) -> Task[Any]:
        block, n_forward = self._stations[step.station].block, len(self._tuning.layout.blocks) - 1
        values = BlockValues(block, self._tuning.names_of(block), self._step)
        number = self._windows[step.shard]
        arguments = (self._tuning.key, values, self._passes.window(number), step.upcoming)
        job: Job[Any]
        if step.station < n_forward:
            job = StudentForward(*arguments)
        elif self._backward:
            job = StudentBackward(*arguments, is_end=step.station == len(self._stations) - 1)
        else:
            job = StudentDivergence(*arguments)
        state = (self._states[block],) if values.needs_state else ()
        outputs = 1 if step.station < n_forward else 2 * self._backward
        label = f"tuning step {self._step + self._backward}, {block}, window {number}"
        return Task(step, job, label, (*state, *inputs), outputs)

    def _on_pass(self, step: Pass, result: TaskResult[Divergence | None]) -> None:
        if result.value is not None:
            self._divergences[step.shard] = result.value
        if len(result.payloads) == 2:
            self._gradients[self._stations[step.station].block][step.shard] = result.payloads[1]


def _names_by_unit(student: Model, sizes: LayerSizes) -> dict[int, list[str]]:
    """Number of a unit of the model -> its compressed matrices."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, entry in student.entries.items():
        names[sizes.unit_of(name, entry.location, student.checkpoint.store.root)].append(name)
    return dict(names)


def teacher_file(number: int) -> str:
    """File of the hidden states of the original model for a window."""
    return f"teacher-{number:05d}.safetensors"


def teacher_files(n_windows: int) -> list[str]:
    """Files of the hidden states of the original model for all windows."""
    return list(map(teacher_file, range(n_windows)))
