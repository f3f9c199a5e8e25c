"""Calibration flow: gathers the Hessians of a model on a text, and caches them for later runs.

The text is cut into shards of a fixed number of windows. One task gathers one shard for one range of layers; other
tasks add the shards of a layer in the order of the text, each as soon as it is available. The result does not depend on
which worker ran which task, and the size of a range bounds the memory.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.calibration.gathering import Gathering, LayerRange, WindowShards
from pipeline.calibration.hessian_store import HessianRow, Hessians, hessian_file, layers_of
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.device import Arithmetic
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.models.loading import ModelKey
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
            RunError: tasks failed; the matrices that were finished are kept.
        """
        if not self.store.is_there:  # a command that is refused for its cluster leaves no cache
            pools.require_workers(self._stage(self._ranges(self._infos)))
        with report_damaged_cache(self.store):
            names = map(hessian_file, self._infos)
            output = begin(OutputRequest(self.store, self._identity, names), log_and_release(pools))
        with output:
            ranges = self._missing_ranges(output)
            if ranges:
                self._gather(ranges, output, pools)
        return Hessians(self.store, self._settings.gradient_share)

    def _gather(self, ranges: Sequence[LayerRange], output: Output, pools: Pools) -> None:
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
                    progress.add(gathering.start_pass(self._missing_ranges(output, gathering.written)))
                    execute(pool, gathering, progress)
        finally:
            pool.close()
        gathering.raise_failures()

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

    def _missing_ranges(self, output: Output, written: Collection[str] = ()) -> list[LayerRange]:
        """Layers whose Hessians are missing."""
        return self._ranges(name for name in self._infos if name not in written and not _is_complete(name, output))

    def _ranges(self, matrices: Iterable[str]) -> list[LayerRange]:
        """The layers of some matrices, in ranges whose sums fit --moment-gib. A layer is never split."""
        ranges: list[LayerRange] = []
        room = 0
        for layer, names in layers_of(list(matrices)).items():
            nbytes = self._sum_bytes(names)
            if not ranges or nbytes > room:
                ranges.append(LayerRange({}))
                room = int(self._settings.moment_gib * 2**30)
            ranges[-1].layers[layer] = names
            room -= nbytes
        return ranges

    def _sum_bytes(self, names: Sequence[str]) -> int:
        return hessian_bytes(self._infos[name] for name in names)


def _is_complete(name: str, output: Output) -> bool:
    """Whether earlier runs wrote the files of a matrix and of the matrix that stores its unweighted Hessian.

    An interrupted run may have left only one of them, and the present run may not need the other matrix.
    """
    owner = _finished_owner(name, output)
    return owner is not None and _finished_owner(owner, output) == owner


def _finished_owner(name: str, output: Output) -> str | None:
    """Matrix that stores the unweighted Hessian of `name`; None if no earlier run finished the file of `name`."""
    finished = output.finished.get(hessian_file(name))
    return None if finished is None else HessianRow.from_json(finished[1][0]).owner
