"""Calibration flow: gathers the Hessians of a model on a text, and caches them for later runs.

The text is cut into shards of a fixed number of windows. One task gathers one shard for one range of layers; other
tasks add the shards of a layer, or of a part of a large one, in the order of the text, each as soon as it is available.
The result does not depend on which worker ran which task, and the size of a range bounds the memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.calibration.gathering import Gathering, LayerRange, WindowShards
from pipeline.calibration.hessian_store import HessianPart, Hessians, StoredHessian, complete, layer_parts, stored_in
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.device import Arithmetic
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.models.loading import ModelKey
from pipeline.outputs.stage import check_on
from pipeline.outputs.transaction import Output, OutputRequest, begin
from pipeline.planning.cost_model import calibration_bytes, calibration_device_bytes, hessian_bytes
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
            pools.require_workers(self._stage(self._ranges(self._infos)))
        with report_damaged_cache(self.store):
            request = OutputRequest(self.store, self._identity, check=check_on(pools))
            output = begin(request, log_and_release(pools))
        with output:
            stored = stored_in(output.finished)
            if ranges := self._missing_ranges(stored):
                stored += self._gather(ranges, stored, output, pools)
        return Hessians(self.store, self._settings.gradient_share, complete(stored)).of(self._infos)

    def _gather(
        self, ranges: Sequence[LayerRange], finished: Sequence[StoredHessian], output: Output, pools: Pools
    ) -> list[StoredHessian]:
        """Gather the Hessians of all layers in `ranges`, and return those that were written.

        Args:
            finished: what earlier runs have written.
        """
        output.add_names([part.file for each in ranges for part in each.parts])
        require_free_space(self.store, sum(self._sum_bytes(part.names) for part in ranges))
        shards = self._shards()
        gathering = Gathering(calibration_key(self._inputs.source, self._settings), shards, output)
        stage = self._stage(ranges)
        pool = pools(len(ranges) * len(shards.starts), stage)
        try:
            windows = gathering.start_pass(ranges)
            with Progress(stage.name, windows, 0, unit=stage.unit) as progress:
                execute(pool, gathering, progress)
                for _ in range(_MAX_PASSES - 1):
                    if not gathering.lost:
                        break
                    progress.log(f"{gathering.lost[0].error}; layers that are not finished are gathered again")
                    missing = self._missing_ranges([*finished, *gathering.written])
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

    def _stage(self, ranges: Sequence[LayerRange]) -> Stage:
        """The stage of a pool whose workers hold the sums of one range each."""
        source, seqlen = self._inputs.source, self._inputs.ids.shape[1]
        sum_bytes = max(self._sum_bytes(part.names) for part in ranges)
        memory = calibration_bytes(source, seqlen, sum_bytes)
        device = calibration_device_bytes(source, seqlen, sum_bytes, self._settings.calibration_dtype)
        return Stage("calibrate", memory, device, "windows", keeps_model=True)

    def _missing_ranges(self, stored: Iterable[StoredHessian]) -> list[LayerRange]:
        """Layers whose Hessians are missing."""
        present = complete(stored)
        return self._ranges(name for name in self._infos if name not in present)

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
