"""How each stage runs on given hardware, and what it takes, from the headers of a model alone."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from pipeline.architectures.model_config import max_positions
from pipeline.blocks.layout import BlockLayout, LayerSizes, layout_within
from pipeline.calibration.flow import calibration_blocks
from pipeline.engine.memory import GPU, Room, WorkerMemory, require_room
from pipeline.errors import ConfigError, SwscError
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model
from pipeline.planning.machine_speed import Speed
from pipeline.planning.memory import (
    WORKER_BASE,
    block_gradient_memory,
    block_memory,
    bytes_of_value,
    dense_bytes,
    evaluation_memory,
    hessian_bytes,
    hidden_bytes,
    layer_activation_bytes,
    restoring_memory,
    stage_memory,
)
from pipeline.planning.plan import Plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.matrix import MatrixSettings

# The evaluation that is planned: windows of at most this many tokens, and windows of a task.
_WINDOWS, _SEQLEN, _TASK_WINDOWS = 64, 2048, 4
# Tokens of a task of calibration, and of a step of tuning.
_SHARD_TOKENS, _STEP_TOKENS = 8192, 2048
# Operations per weight and token of a forward pass, and of a backward pass for activations alone.
_PASS = 2
# Bytes per weight of the labels of a tuned matrix, and of the largest one while its gradient is projected.
_LABEL_BYTES, _PROJECTED_BYTES = 1, 16
_WHOLE = "whole model per worker"


@dataclass(frozen=True)
class Hardware:
    """The workers that a plan is made for.

    Attributes:
        room: what a worker may hold.
        host: the same of a stage that uses no device.
        count: returns how many workers a stage of some tasks gets, by the memory of each.
    """

    room: Room
    host: Room
    count: Callable[[int, WorkerMemory], int]


@dataclass(frozen=True)
class StagePlan:
    """How a stage runs.

    Attributes:
        stage: its name.
        way: what a worker holds, or why the stage is impossible.
        is_possible: whether a worker has enough memory.
        workers: number of workers.
        host_bytes: peak of a worker's resident memory.
        device_bytes: peak of its GPU memory; 0 on a CPU.
        read_bytes: read from storage, by all workers.
        hidden_bytes: hidden states that travel between workers.
        seconds: predicted time; None if there is no prediction.
    """

    stage: str
    way: str
    is_possible: bool = True
    workers: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    read_bytes: int = 0
    hidden_bytes: int = 0
    seconds: float | None = None

    def to_json(self) -> dict[str, object]:
        """The stage as the JSON file has it."""
        return asdict(self)


@contextmanager
def hardware_of(cluster: ClusterSettings) -> Iterator[Hardware]:
    """The workers of the cluster that `cluster` names, or those that the settings describe."""
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    if cluster.address:
        with worker_pools(cluster) as pools:
            yield Hardware(pools.room(), pools.room_of(on_cpu=True), pools.count)
        return
    workers = 1 if cluster.local else cluster.workers or len(os.sched_getaffinity(0))
    host = _described(cluster.model_copy(update={"gpus_per_worker": 0.0}))
    yield Hardware(_described(cluster), host, lambda tasks, memory: max(1, min(tasks, workers)))


def _described(cluster: ClusterSettings) -> Room:
    """The room of a worker by the settings; by this machine if they do not give its memory."""
    from pipeline.engine.ray_backend.cluster import local_memory

    cap = cluster.memory_per_worker
    if cap is None and cluster.gpus_per_worker:
        raise ConfigError("--gpus-per-worker without --address: describe the memory of a GPU by --memory-per-worker")
    if cap is None:
        return Room(*local_memory(cluster))
    kind = GPU if cluster.gpus_per_worker else "cpu"
    if cluster.gpus_per_worker is None:
        kind = local_memory(cluster)[0]
    return Room(kind, int(cap * 2**30))


@dataclass(frozen=True)
class StagePlanner:
    """Plans the stages of one compression, and of the verbs that use its model."""

    model: Model
    plan: Plan
    settings: MatrixSettings
    calibration: CalibrationSettings
    hardware: Hardware
    speed: Speed

    def stages(self, compress_seconds: float) -> list[StagePlan]:
        """All stages, in the order of a run."""
        memories = stage_memory(self.model, self.plan, self.settings, self.calibration)
        evaluate = self._evaluate()
        return [
            *([self._calibrate(memories["calibrate"])] if "calibrate" in memories else []),
            self._compress(memories["compress"], compress_seconds),
            *([self._tune(memories["tune"])] if "tune" in memories else []),
            evaluate,
            self._lm_eval(evaluate),
            self._sweep(evaluate, memories["compress"]),
            self._restore(),
        ]

    def _calibrate(self, memory: WorkerMemory) -> StagePlan:
        tokens = self.calibration.calibration_windows * self.calibration.calibration_seqlen
        sums = hessian_bytes(decision.matrix for decision in self.plan.compressed)
        passes = max(1, math.ceil(sums / (self.calibration.moment_gib * 2**30)))
        shards = max(1, tokens // _SHARD_TOKENS)
        if self.hardware.room.holds(memory):
            return self._whole("calibrate", memory, passes * shards, 2 * _PASS * tokens * passes)
        seqlen, matrices = self.calibration.calibration_seqlen, [each.matrix for each in self.plan.compressed]
        try:
            key = self._key(self.calibration.calibration_dtype)
            blocks = calibration_blocks(self.model, key, matrices, self.hardware.room, (seqlen, shards))
        except SwscError as error:
            return StagePlan("calibrate", f"impossible: {error}", False)
        # Each block is read forward and backward; hidden states travel forward, gradients backward.
        stage = self._blocks("calibrate", blocks.layout, blocks.working, tokens)
        seconds = self._seconds(2 * self._stored, 4 * _PASS * tokens, max(1, stage.workers))
        return replace(stage, read_bytes=2 * stage.read_bytes, hidden_bytes=2 * stage.hidden_bytes, seconds=seconds)

    def _compress(self, memory: WorkerMemory, seconds: float) -> StagePlan:
        tasks = len(self.plan.layers) + len(self.plan.copies)
        hessians, on_gpu = self.settings.needs_hessians, self.hardware.room.kind == GPU
        sums = hessian_bytes(decision.matrix for decision in self.plan.compressed) if hessians else 0
        stage = self._stage("compress", "one matrix at a time", memory, tasks)
        return (
            replace(stage, read_bytes=self._stored + sums, seconds=None if on_gpu else seconds)
            if stage.is_possible
            else stage
        )

    def _tune(self, memory: WorkerMemory) -> StagePlan:
        seqlen = self.calibration.calibration_seqlen
        tokens = self.calibration.calibration_windows * seqlen * (self.settings.epochs or 0)
        if not self.hardware.room.holds(memory):
            return self._tune_in_blocks(seqlen, tokens)
        stage = self._whole("tune", memory, max(1, _STEP_TOKENS // seqlen), 3 * _PASS * tokens)
        return replace(stage, read_bytes=stage.read_bytes + 2 * stage.workers * self.plan.stored_bytes_as("swsc"))

    def _tune_in_blocks(self, seqlen: int, tokens: int) -> StagePlan:
        """Tuning as `BlockTuning` divides it; the compressed model is dense in memory, so it has the same sizes."""
        key, room = self._key(self.calibration.calibration_dtype), self.hardware.room
        try:
            sizes = LayerSizes.of(self.model, key, room.kind)
            extra = dict.fromkeys(range(len(sizes.values)), layer_activation_bytes(self.model, seqlen))
            for decision in self.plan.compressed:
                unit = sizes.unit_of(decision.info.name, decision.location, key.location)
                extra[unit] += _LABEL_BYTES * decision.info.count
            extra[len(sizes.values) - 1] += sizes.values[-1]
            largest = _PROJECTED_BYTES * max(decision.info.count for decision in self.plan.compressed)
            working = block_gradient_memory(self.model, seqlen, 1) + WorkerMemory(largest, 0, largest)
            layout = layout_within(room, key, sizes.plus(extra), working)
        except SwscError as error:
            return StagePlan("tune", f"impossible: {error}", False)
        stage = self._blocks("tune", layout, working, tokens)
        # Every step reads the blocks forward and backward, unless each stays with its worker.
        steps = 1 if stage.workers >= len(layout.blocks) else 2 * max(1, tokens // _STEP_TOKENS)
        return replace(stage, read_bytes=steps * stage.read_bytes, hidden_bytes=2 * stage.hidden_bytes, seconds=None)

    def _evaluate(self) -> StagePlan:
        seqlen = self._seqlen
        whole = evaluation_memory(self.model, "auto", seqlen)
        if self.hardware.room.holds(whole):
            return self._whole("evaluate", whole, _WINDOWS // _TASK_WINDOWS, _PASS * _WINDOWS * seqlen)
        return self._evaluate_in_blocks()

    def _evaluate_in_blocks(self) -> StagePlan:
        seqlen = self._seqlen
        working = block_memory(self.model, "auto", seqlen, _TASK_WINDOWS * seqlen)
        key, room = self._key("auto"), self.hardware.room
        try:
            layout = layout_within(room, key, LayerSizes.of(self.model, key, room.kind), working)
        except SwscError as error:
            return StagePlan("evaluate", f"impossible: {error}", False)
        return self._blocks("evaluate", layout, working, _WINDOWS * seqlen)

    def _key(self, dtype: str) -> ModelKey:
        return ModelKey(self.model.checkpoint.store.root, dtype, 1, self.calibration.trust_remote_code)

    def _blocks(self, name: str, layout: BlockLayout, working: WorkerMemory, tokens: int) -> StagePlan:
        """A forward pass of blocks over some tokens: the pool reads each block once."""
        layers, count = max(len(block.layers) for block in layout.blocks), len(layout.blocks)
        way = f"{count} blocks of up to {layers} layers"
        stage = self._stage(name, way, working + layout.weights, min(count, _WINDOWS // _TASK_WINDOWS))
        if not stage.is_possible:
            return stage
        value_bytes = bytes_of_value(self.model, "auto", self.hardware.room.kind)
        travelling = (count - 1) * hidden_bytes(self.model, tokens, value_bytes) // 2
        seconds = self._seconds(self._stored, _PASS * tokens, stage.workers)
        return replace(stage, read_bytes=self._stored, hidden_bytes=travelling, seconds=seconds)

    def _lm_eval(self, evaluate: StagePlan) -> StagePlan:
        """Tasks of log-likelihoods, which run as an evaluation does."""
        return replace(evaluate, stage="lm-eval", seconds=None)

    def _sweep(self, evaluate: StagePlan, compression: WorkerMemory) -> StagePlan:
        """A worker with the whole model also compresses; in blocks, variants share those of the evaluation."""
        memory = evaluation_memory(self.model, "auto", self._seqlen) + compression - WORKER_BASE
        if self.hardware.room.holds(memory):
            return replace(self._whole("sweep", memory, _WINDOWS // _TASK_WINDOWS, 0), seconds=None)
        in_blocks = evaluate if evaluate.way != _WHOLE else self._evaluate_in_blocks()
        return replace(in_blocks, stage="sweep", seconds=None)

    def _restore(self) -> StagePlan:
        tensors = {decision.location.tensor or decision.info.name for decision in self.plan.compressed}
        file_bytes = max((layer.nbytes for layer in self.plan.layers), default=0)
        memory = restoring_memory(max(map(self.model.count, tensors)), file_bytes)
        on_cpu = replace(self, hardware=replace(self.hardware, room=self.hardware.host))
        stage = on_cpu._stage("restore", "one layer at a time", memory, len(self.plan.layers))
        return replace(stage, read_bytes=self.plan.stored_bytes_as("swsc")) if stage.is_possible else stage

    @property
    def _seqlen(self) -> int:
        """Tokens of a window of the evaluation."""
        return min(_SEQLEN, max_positions(self.model.config) or _SEQLEN)

    @property
    def _stored(self) -> int:
        """Bytes of the files of the original model."""
        return dense_bytes(self.model)

    def _whole(self, name: str, memory: WorkerMemory, tasks: int, operations: int) -> StagePlan:
        """A stage whose workers load the whole model; `operations` per weight."""
        stage = self._stage(name, _WHOLE, memory, tasks)
        if not stage.is_possible:
            return stage
        nbytes = stage.workers * self._stored
        return replace(stage, read_bytes=nbytes, seconds=self._seconds(nbytes, operations, stage.workers))

    def _stage(self, name: str, way: str, memory: WorkerMemory, tasks: int) -> StagePlan:
        room = self.hardware.room
        stage = StagePlan(name, way, True, 0, memory.resident(room.kind), memory.device if room.kind == GPU else 0)
        try:
            require_room(name, memory, room)
            return replace(stage, workers=self.hardware.count(tasks, memory))
        except SwscError as error:
            return replace(stage, way=f"impossible: {str(error).removeprefix(f'{name}: ')}", is_possible=False)

    def _seconds(self, nbytes: int, operations: int, workers: int) -> float | None:
        """Time of reading and of passes by CPUs; None on GPUs, whose speed is not known here."""
        if self.hardware.room.kind == GPU:
            return None
        return (nbytes / self.speed.stream + operations * self.model.weights / self.speed.gemm) / workers
