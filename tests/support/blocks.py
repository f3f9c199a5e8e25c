"""Losses of windows under the whole model and in blocks, both on one worker in this process."""

from functools import cache
from typing import Any

import numpy as np

from pipeline.blocks.block import Block, partition
from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.twin import require_blocks
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.worker import Worker
from pipeline.evaluation.blocks_flow import measure_in_blocks
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.models.loading import ModelKey, meta_model

# 5 windows of 24 tokens in batches of 2, of which the last one is smaller
WINDOWS = np.random.default_rng(0).integers(1, 250, (5, 24))


def model_key(location: object, dtype: str = "float32") -> ModelKey:
    """Key of a model that is evaluated in batches of two windows."""
    return ModelKey(str(location), dtype, 2)


def blocks_of(n_layers: int, size: int) -> tuple[Block, ...]:
    """Blocks of `size` layers; the last one may be smaller."""
    return tuple(Block(start, min(start + size, n_layers), n_layers) for start in range(0, n_layers, size))


@cache
def layout_of(location: str, size: int) -> BlockLayout:
    """A model in blocks of `size` units (embedding, layers, head), if its family can run in them."""
    model = meta_model(model_key(location))
    blocks = partition([1] * (model.config.get_text_config().num_hidden_layers + 2), size)
    return BlockLayout(blocks, require_blocks(type(model), model.config, blocks, location), WorkerMemory())


def losses_whole(key: ModelKey) -> WindowLosses:
    """Losses under the whole model."""
    return Worker(1, "cpu").run(MeasureLosses(key, WINDOWS)).value


def losses_in_blocks(key: ModelKey, size: int, worker: Worker | None = None) -> WindowLosses:
    """Losses in blocks of `size` units (embedding, layers, head); the windows travel in shards of four."""
    pool, windows = LocalPool(worker or Worker(1, "cpu")), WINDOWS
    parts = [(start, windows[start : start + 4]) for start in range(0, len(windows), 4)]
    measured: dict[int, WindowLosses] = {}
    pools: Any = lambda tasks, stage: pool  # noqa: E731
    measure_in_blocks(key, layout_of(key.location, size), WorkerMemory(), parts, pools, measured.__setitem__)
    dtypes = {part.dtype for part in measured.values()}
    assert len(dtypes) == 1
    return WindowLosses(tuple(loss for start in sorted(measured) for loss in measured[start].losses), dtypes.pop())
