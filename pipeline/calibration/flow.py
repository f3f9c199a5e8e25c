"""Calibration flow: gathers the Hessians of a model on a text, and caches them for later runs.

The text is cut into shards of a fixed number of windows. One task gathers one shard for one range of layers; other
tasks add the shards of a layer, or of a part of a large one, in the order of the text, each as soon as it is available.
The result does not depend on which worker ran which task, and the size of a range bounds the memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.blocks.layout import BlockLayout, LayerSizes, layout_within
from pipeline.calibration.blocks_flow import PIECE_TOKENS, BlockCalibration, BlockGathering, parts_by_unit
from pipeline.calibration.gathering import Gathering, LayerRange, WindowShards
from pipeline.calibration.hessian_store import HessianPart, Hessians, StoredHessian, complete, layer_parts, stored_in
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.device import Arithmetic
from pipeline.engine.memory import Room, WorkerMemory
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model
from pipeline.outputs.stage import check_on
from pipeline.outputs.transaction import Output, OutputRequest, begin
from pipeline.planning.memory import (
    block_gradient_memory,
    calibration_memory,
    hessian_bytes,
    layer_activation_bytes,
)
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage.cache_key import cache_name, versioned, windows_identity
from pipeline.storage.records import report_damaged_cache
from pipeline.storage.store import Store, require_free_space

# Tokens that one task gathers.
_SHARD_TOKENS = 8192
# Passes over the text: sums that were lost with a node are gathered again, at most this many times in all.
_MAX_PASSES = 3
_CPU = Arithmetic(1)


def calibration_key(source: Checkpoint, settings: CalibrationSettings) -> ModelKey:
    """Key under which workers load the model that is calibrated."""
    known = digests_of_source(source)
    return ModelKey(source.store.root, settings.calibration_dtype, 1, settings.trust_remote_code, known)


@dataclass(frozen=True)
class CalibrationInputs:
    """What a calibration computes, besides its settings.

    Attributes:
        source: the original model.
        matrices: matrices whose Hessians are needed.
        ids: windows of tokens, int64 [windows, seqlen].
        seed: of the run.
        arithmetic: of the workers. Different kinds of GPU give different last bits, so each kind has its own cache
            entry.
    """

    source: Checkpoint
    matrices: Sequence[MatrixInfo]
    ids: np.ndarray
    seed: int
    arithmetic: Arithmetic = _CPU


@dataclass(frozen=True)
class CalibrationBlocks:
    """The blocks of a calibration, see `BlockCalibration`."""

    layout: BlockLayout
    parts: Mapping[int, list[HessianPart]]
    working: WorkerMemory


def calibration_blocks(
    model: Model, key: ModelKey, matrices: Sequence[MatrixInfo], room: Room, text: tuple[int, int]
) -> CalibrationBlocks:
    """Cut a model into blocks that a worker can calibrate.

    Args:
        model, key: the model, and how it is loaded.
        matrices: matrices whose Hessians are needed.
        room: what a worker may hold.
        text: tokens of a window, and number of shards.

    Raises:
        ClusterError: not even the largest layer fits.
        BlocksUnsupported: the model cannot run in blocks.
    """
    seqlen, n_shards = text
    sizes = LayerSizes.of(model, key, room.kind)
    infos = {info.name: info for info in matrices}
    parts = parts_by_unit([part for layer in layer_parts(matrices) for part in layer], infos, sizes, key.location)
    sums = {unit: sum(hessian_bytes(infos[name] for name in part.names) for part in own) for unit, own in parts.items()}
    # The sums of the present shard, and those of the earlier ones.
    copies, activations = min(2, n_shards), layer_activation_bytes(model, seqlen)
    extra = {unit: activations + copies * sums.get(unit, 0) for unit in range(len(sizes.values))}
    working = block_gradient_memory(model, seqlen, max(1, PIECE_TOKENS // seqlen))
    return CalibrationBlocks(layout_within(room, key, sizes.plus(extra), working), parts, working)


class Calibration:
    """Gathers the Hessians that the cache lacks. `store` is the directory of the cache that holds them."""

    def __init__(self, inputs: CalibrationInputs, settings: CalibrationSettings, cache: str) -> None:
        """A calibration that `run` begins or resumes. All nodes must see the directory `cache`."""
        self._inputs, self._settings = inputs, settings
        self._infos = {info.name: info for info in inputs.matrices}
        about = {"source": inputs.source.fingerprint, "seed": inputs.seed, "dtype": settings.calibration_dtype}
        self._identity = versioned("moments", about | windows_identity(inputs.ids) | inputs.arithmetic.gpu_identity)
        self.store = Store.at(f"{cache}/{cache_name('moments', self._identity)}")

    def run(self, pools: Pools) -> Hessians:
        """Gather the missing Hessians, and return all of them.

        Raises:
            RunError: tasks failed; the files that were finished are kept.
        """
        if not self.store.is_there:  # a command that is refused for its cluster leaves no cache
            pools.require_workers(self._stage(list(self._infos), pools.room()))
        with report_damaged_cache(self.store):
            request = OutputRequest(self.store, self._identity, check=check_on(pools))
            output = begin(request, log_and_release(pools))
        with output:
            stored = stored_in(output.finished)
            if missing := self._missing(stored):
                require_free_space(self.store, self._sum_bytes(missing))
                stored += self._gather_missing(missing, stored, output, pools)
        return Hessians(self.store, self._settings.gradient_share, complete(stored)).of(self._infos)

    def _gather_missing(
        self, names: Sequence[str], finished: Sequence[StoredHessian], output: Output, pools: Pools
    ) -> list[StoredHessian]:
        """Gather the Hessians of some matrices, and return those that were written.

        Args:
            finished: what earlier runs have written.
        """
        blocks = self._in_blocks(names, pools.room())
        if blocks is None:
            return self._gather(names, finished, output, pools)
        gathering = BlockGathering(blocks, output)
        gathering.run(pools)
        return gathering.written

    def _gather(
        self, names: Sequence[str], finished: Sequence[StoredHessian], output: Output, pools: Pools
    ) -> list[StoredHessian]:
        """Gather the Hessians with workers that hold the whole model."""
        shards, ranges = self._shards(), self._ranges(names)
        output.add_names([part.file for each in ranges for part in each.parts])
        gathering = Gathering(calibration_key(self._inputs.source, self._settings), shards, output)
        stage = self._whole_stage(ranges)
        pool = pools(len(ranges) * len(shards.starts), stage)
        try:
            windows = gathering.start_pass(ranges)
            with Progress(stage.name, windows, 0, unit=stage.unit) as progress:
                execute(pool, gathering, progress)
                for _ in range(_MAX_PASSES - 1):
                    if not gathering.lost:
                        break
                    progress.log(f"{gathering.lost[0].error}; layers that are not finished are gathered again")
                    missing = self._ranges(self._missing([*finished, *gathering.written]))
                    output.add_names([part.file for each in missing for part in each.parts])
                    progress.add(gathering.start_pass(missing))
                    execute(pool, gathering, progress)
        finally:
            pool.close()
        gathering.raise_failures()
        return gathering.written

    def _shards(self) -> WindowShards:
        seqlen = self._inputs.ids.shape[1]
        return WindowShards(self._inputs.ids, max(1, _SHARD_TOKENS // seqlen), self._inputs.seed)

    def _in_blocks(self, names: Sequence[str], room: Room) -> BlockCalibration | None:
        """The calibration of some matrices in blocks; None if a worker can hold the whole model."""
        if room.holds(self._whole_stage(self._ranges(names)).memory):
            return None
        source, seqlen, shards = self._inputs.source, self._inputs.ids.shape[1], self._shards()
        key, infos = calibration_key(source, self._settings), list(map(self._infos.__getitem__, names))
        blocks = calibration_blocks(Model(source, {}), key, infos, room, (seqlen, len(shards.starts)))
        return BlockCalibration(key, blocks.layout, blocks.parts, shards, blocks.working)

    def _stage(self, names: Sequence[str], room: Room) -> Stage:
        """The stage of a pool that gathers the Hessians of some matrices."""
        blocks = self._in_blocks(names, room)
        return blocks.stage if blocks else self._whole_stage(self._ranges(names))

    def _whole_stage(self, ranges: Sequence[LayerRange]) -> Stage:
        """The stage of a pool whose workers hold the whole model, and the sums of one range each."""
        model, seqlen = Model(self._inputs.source, {}), self._inputs.ids.shape[1]
        sum_bytes = max(self._sum_bytes(part.names) for part in ranges)
        memory = calibration_memory(model, seqlen, sum_bytes, self._settings.calibration_dtype)
        return Stage("calibrate", memory, "windows", keeps_model=True)

    def _missing(self, stored: Iterable[StoredHessian]) -> list[str]:
        """Matrices whose Hessians are missing."""
        present = complete(stored)
        return [name for name in self._infos if name not in present]

    def _ranges(self, matrices: Iterable[str]) -> list[LayerRange]:
        """The layers of some matrices, in ranges whose sums fit --moment-gib. A layer is in one range."""
        ranges: list[list[HessianPart]] = []
        room = 0
        for parts in layer_parts(self._infos[name] for name in matrices):
            nbytes = self._sum_bytes([name for part in parts for name in part.names])
            if not ranges or nbytes > room:
                ranges.append([])
                room = int(self._settings.moment_gib * 2**30)
            ranges[-1] += parts
            room -= nbytes
        return [LayerRange(tuple(parts)) for parts in ranges]

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return hessian_bytes(self._infos[name] for name in names)
