"""Calibration text that the model generates itself, for preset data-free.

Samples of a model show its matrices realistic inputs (Liu et al. 2023, LLM-QAT). The windows are cached beside the
Hessians. They are generated in batches of fixed size, so that the text does not depend on the number of workers.
"""

from typing import Any

import numpy as np

from pipeline.calibration.flow import calibration_key
from pipeline.calibration.job import GenerateText
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.models.stored_model import Model
from pipeline.planning.memory import calibration_memory
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage.cache_key import cache_name, versioned
from pipeline.storage.records import read_cached
from pipeline.storage.store import Store
from pipeline.texts.windows import load_tokenizer, prefix_tokens

# Windows that one task generates together.
_BATCH = 16


def self_generated_windows(
    source: Checkpoint,
    settings: CalibrationSettings,
    cache: str,
    seed: int,
    pools: Pools,
    arithmetic: Arithmetic,
) -> np.ndarray:
    """Windows of text that the model generates, int64 [windows, seqlen]; read from the cache if they are in it.

    Raises:
        TextError: the model has no tokenizer, which defines how a text begins.
    """
    count, seqlen = settings.calibration_windows, settings.calibration_seqlen
    prefix = prefix_tokens(load_tokenizer(source.store.root, settings.trust_remote_code))
    identity = versioned(
        "written",
        {
            "source": source.fingerprint,
            "windows": [count, seqlen],
            "seed": seed,
            "dtype": settings.calibration_dtype,
            "opening": prefix.tolist(),
            **arithmetic.gpu_identity,
        },
    )
    store, file = Store.at(cache), f"{cache_name('written', identity)}.json"
    if store.exists(file):
        return read_cached(store, file, lambda: _checked(store.read_json(file), count, seqlen))
    key = calibration_key(source, settings)
    tasks = [
        Task(first, GenerateText(key, min(_BATCH, count - first), seqlen, first, seed, prefix), f"text {first}")
        for first in range(0, count, _BATCH)
    ]
    memory = calibration_memory(Model(source, {}), seqlen, 0, settings.calibration_dtype)
    ids = _run(tasks, Stage("write text", memory, "parts"), pools)
    store.write_json(file, ids.tolist())
    return ids


def _run(tasks: list[Task[np.ndarray]], stage: Stage, pools: Pools) -> np.ndarray:
    """Results of the tasks, concatenated in the order of their keys."""
    results: dict[int, np.ndarray] = {}

    def on_done(done: TaskResult[np.ndarray]) -> None:
        results[done.task.key] = done.value

    run_stage(pools, stage, tasks, on_done)
    return np.concatenate([results[first] for first in sorted(results)])


def _checked(ids: Any, count: int, seqlen: int) -> np.ndarray:
    """Cached token ids as int64 [count, seqlen]; raises ValueError for anything else."""
    windows = np.array(ids)
    if windows.shape != (count, seqlen) or windows.dtype != np.int64 or windows.min(initial=0) < 0:
        raise ValueError(f"expected token ids [{count}, {seqlen}], got {windows.dtype} {list(windows.shape)}")
    return windows
