"""Calibration of a model in blocks: windows travel forward to the loss, gradients backward, Hessians stay on a worker.

Each block is read once forward and once backward. The sums of a block are complete when the last shard of windows has
passed it, so nothing is added up in tasks of its own.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.blocks.block import Block
from pipeline.blocks.layout import BlockLayout, LayerSizes
from pipeline.blocks.runner import BlockKey
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import Station, backward_stations
from pipeline.calibration.blocks_job import BackwardBlock, ForwardBlock, GatherResult, PieceOfText
from pipeline.calibration.gathering import CalibratedSource, WindowShards, WriteKey, write_task
from pipeline.calibration.hessian_store import HessianPart, StoredHessian
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import PayloadLost
from pipeline.models.loading import ModelKey
from pipeline.outputs.transaction import Output

# Tokens that travel together, at most.
PIECE_TOKENS = 1024


@dataclass(frozen=True)
class BlockCalibration:
    """What is calibrated in which blocks.

    Attributes:
        parts: what is calibrated in each unit of the model.
        working: what a worker needs besides a block.
    """

    key: ModelKey
    layout: BlockLayout
    parts: Mapping[int, list[HessianPart]]
    shards: WindowShards
    working: WorkerMemory

    def parts_of(self, block: Block) -> list[HessianPart]:
        """What is calibrated in a block."""
        return [part for unit in block.units for part in self.parts.get(unit, ())]

    @property
    def pieces(self) -> range:
        """Index of the first window of each piece. Pieces are small, so that many workers can pass them on."""
        size, seqlen = self.shards.size, self.shards.ids.shape[1]
        most = max(1, PIECE_TOKENS // seqlen)
        windows = max(divisor for divisor in range(1, min(size, most) + 1) if size % divisor == 0)
        return range(0, len(self.shards.ids), windows)

    def piece(self, number: int) -> PieceOfText:
        """A piece of the text."""
        pieces, ids = self.pieces, self.shards.ids
        windows = ids[pieces[number] :][: pieces.step]
        end = pieces[number] + len(windows)
        is_last = end == len(ids)
        return PieceOfText(windows, number, pieces[number], is_last or end % self.shards.size == 0, is_last)

    @property
    def stage(self) -> Stage:
        """The stage of a pool whose workers hold one block each."""
        return Stage("calibrate", self.working + self.layout.weights, "passes", keeps_model=True)

    @property
    def stations(self) -> tuple[Station, ...]:
        """The passes, up to the backward pass of the first block with matrices."""
        stations = backward_stations(self.layout.blocks)
        needed = [number for number, station in enumerate(stations) if station.adds and self.parts_of(station.block)]
        return stations[: needed[-1] + 1]


class BlockGathering:
    """Task source of a calibration in blocks: passes of blocks, and tasks that write the sums of finished ones.

    Attributes:
        written: the Hessians that this run has written.
    """

    def __init__(self, calibration: BlockCalibration, output: Output) -> None:
        """A source with all tasks. `output` is the cache directory that this run may write."""
        self.written: list[StoredHessian] = []
        self._calibration, self._output = calibration, output
        self._key = BlockKey(calibration.key, calibration.layout.tuple_length)
        self._stations = calibration.stations
        self._source = CalibratedSource(output.store)
        self._to_write: list[Task[Any]] = []
        self._station_of = {
            part.file: number
            for number, station in enumerate(self._stations)
            if station.adds
            for part in calibration.parts_of(station.block)
        }
        output.add_names(list(self._station_of))
        self._n_workers = 0
        n_pieces = len(calibration.pieces)
        self._schedule = BlockSchedule(
            self._stations, n_pieces, lambda: self._n_workers, self._pass_task, self._on_pass
        )

    @property
    def n_passes(self) -> int:
        """Number of passes of blocks, if nothing is lost."""
        return len(self._stations) * len(self._calibration.pieces)

    @property
    def work(self) -> float:
        """Estimated work of all passes, in forward passes of one block."""
        return len(self._calibration.pieces) * sum(map(_work, self._stations))

    def run(self, pools: Pools) -> None:
        """Run all tasks. Raises RunError if one fails."""
        stage = self._calibration.stage
        pool = pools(min(len(self._stations), len(self._calibration.pieces)), stage)
        try:
            self._n_workers = pool.size
            with Progress(stage.name, self.n_passes, self.work, unit=stage.unit) as progress:
                execute(pool, self, progress)
        finally:
            pool.close()
        self._schedule.require_finished()

    def next(self, worker: int) -> Task[Any] | None:
        if not self._to_write:
            return self._schedule.next(worker)
        self._schedule.seen(worker)
        return self._to_write.pop()

    def done(self, result: TaskResult[Any]) -> None:
        key = result.task.key
        if not isinstance(key, WriteKey):
            self._schedule.done(result)
        elif isinstance(result.error, PayloadLost):
            self._schedule.rewind(self._station_of[key.file])
        elif result.error:
            raise result.error
        else:
            self.written += [StoredHessian(key.file, row) for row in result.value]

    def _pass_task(self, step: Pass, inputs: tuple[Any, ...]) -> Task[GatherResult]:
        station, piece = self._stations[step.station], self._calibration.piece(step.shard)
        seed = self._calibration.shards.seed
        block = station.block
        label = f"{block}, calibration windows {piece.first} to {piece.first + len(piece.windows) - 1}"
        if not station.adds:
            job = ForwardBlock(self._key, block, piece, step.upcoming)
            return Task(step, job, label, inputs, outputs=1, work=_work(station))
        parts = tuple(part.names for part in self._calibration.parts_of(block))
        gather = BackwardBlock(self._key, block, parts, piece, seed, step.adds, step.upcoming)
        outputs = 1 + len(parts) * gather.returns_sums
        return Task(step, gather, label, inputs, outputs=outputs, work=_work(station))

    def _on_pass(self, step: Pass, result: TaskResult[GatherResult]) -> None:
        if result.value.sums_lost:
            self._schedule.rewind(step.station)
            return
        self._source.add(result.value.source_digests)
        written = {each.file for each in self.written}
        parts = self._calibration.parts_of(self._stations[step.station].block)
        for part, total in zip(parts, result.payloads[1:], strict=False):
            if part.file not in written:
                self._to_write.append(write_task(part, total, self._output))


def _work(station: Station) -> float:
    """Estimated work of a pass: the backward pass repeats the forward pass, and takes as long for the gradients."""
    return 3.0 if station.adds else 1.0


def parts_by_unit(
    parts: Iterable[HessianPart], matrices: Mapping[str, MatrixInfo], sizes: LayerSizes, location: str
) -> dict[int, list[HessianPart]]:
    """Number of a unit of the model -> what is calibrated in it.

    Raises:
        BlocksUnsupported: a matrix is neither in a layer nor the embedding or the head.
    """
    found: dict[int, list[HessianPart]] = defaultdict(list)
    for part in parts:
        info = matrices[part.names[0]]
        found[sizes.unit_of(info.name, info.location, location)].append(part)
    return dict(found)
