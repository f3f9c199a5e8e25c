"""Models of a sweep that do not fit a worker: they are evaluated in blocks, which all their variants share."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.blocks.layout import BlockLayout, LayerSizes, layout_within
from pipeline.blocks.runner import BlockKey
from pipeline.engine.memory import Room, WorkerMemory, largest
from pipeline.engine.stage import Stage
from pipeline.evaluation.flow import batch_parts, evaluator_memory, model_key
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.planning.memory import WORKER_BASE, block_memory, compression_memory
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run

# Bytes per weight of the largest matrix while it is exchanged: its stored parts, its restored weight and temporaries.
_EXCHANGE = 16


@dataclass(frozen=True)
class BlockedModel:
    """A stored model in blocks, and the runs and evaluations that share them.

    Attributes:
        runs: numbers of the runs: all untuned variants of a model, or one tuned variant.
        evaluations: numbers of the evaluations, which load the model in the same way.
        working: what a worker needs besides a block.
    """

    source: Model
    key: BlockKey
    layout: BlockLayout
    runs: frozenset[int]
    evaluations: frozenset[int]
    working: WorkerMemory

    @property
    def stage(self) -> Stage:
        """The stage that passes the windows of all runs through the blocks."""
        return Stage("sweep", self.working + self.layout.weights, "passes", keeps_model=True)


def blocked_models(inputs: SweepInputs, runs: Sequence[Run], room: Room) -> list[BlockedModel]:
    """The models that do not fit the room of a worker; none if the whole sweep fits.

    Raises:
        ClusterError: a layer of a model does not fit.
        BlocksUnsupported: a model does not fit, and it cannot run in blocks.
    """
    found: list[BlockedModel] = []
    for number, checkpoint in enumerate(inputs.checkpoints):
        own = [run for run in runs if run.model == number]
        if inputs.settings.evaluations and not room.holds(peak_memory(inputs, runs, [number])):
            found += _in_blocks(inputs, [run for run in own if not run.tuned], Model(checkpoint, {}), room)
            for run in own:
                if run.tuned:
                    found += _in_blocks(inputs, [run], open_model(run.tuned.checkpoint.store.root), room)
    return found


def peak_memory(inputs: SweepInputs, runs: Sequence[Run], models: Iterable[int]) -> WorkerMemory:
    """What a worker needs, which may hold one of some evaluated models while it compresses.

    Args:
        models: numbers of the models that it evaluates whole.
    """
    sources = [Model(inputs.checkpoints[number], {}) for number in models]
    compression = largest(compression_memory(run.plan) for run in runs if run.plan)
    evaluations = [evaluator_memory(source, text) for source in sources for text in inputs.settings.evaluations]
    return largest([*evaluations, WORKER_BASE]) + compression - WORKER_BASE


def _in_blocks(inputs: SweepInputs, runs: Sequence[Run], source: Model, room: Room) -> list[BlockedModel]:
    """The blocks of one stored model for some of its runs, once for each way in which evaluations load it."""
    if not runs:
        return []
    groups: dict[ModelKey, list[int]] = {}
    evaluations = inputs.evaluations_of(runs[0])
    for number, (_, settings) in enumerate(evaluations):
        key = replace(model_key(source.checkpoint, settings), batch_size=1)  # it has no effect on what is loaded
        groups.setdefault(key, []).append(number)
    found = []
    for key, numbers in groups.items():
        needed = [_working_memory(source, evaluations[number][0].ids, evaluations[number][1]) for number in numbers]
        exchanged = _EXCHANGE * max((d.info.count for run in runs for d in run.decisions), default=0)
        working = largest(needed) + WorkerMemory(exchanged, exchanged, exchanged)
        sizes = LayerSizes.of(source, key, room.kind)
        layout = layout_within(room, key, sizes.plus(_mapped_bytes(runs, sizes, room)), working)
        block_key = BlockKey(key, layout.tuple_length)
        numbers_of_runs = frozenset(run.number for run in runs)
        found.append(BlockedModel(source, block_key, layout, numbers_of_runs, frozenset(numbers), working))
    return found


def _working_memory(source: Model, ids: np.ndarray, settings: EvaluateSettings) -> WorkerMemory:
    shard = max(part.size for _, part in batch_parts(ids, settings))
    return block_memory(source, settings.dtype, settings.batch_size * settings.seqlen, shard)


def _mapped_bytes(runs: Sequence[Run], sizes: LayerSizes, room: Room) -> dict[int, int]:
    """Unit -> bytes of the compressed matrices of a variant that a worker on a CPU maps into its memory, at most."""
    mapped: dict[int, int] = {}
    for run in runs if room.kind == "cpu" else ():
        own: Counter[int] = Counter()
        for decision in run.decisions:
            tensor = decision.matrix.location.tensor or decision.matrix.name
            if tensor in sizes.numbers:
                own[sizes.numbers[tensor]] += decision.stored_bytes
        mapped |= {layer: max(nbytes, mapped.get(layer, 0)) for layer, nbytes in own.items()}
    return mapped
