"""Calibration text that a model writes itself: all that is to be had where there is no text (preset data-free).

A model's own samples show its matrices what its inputs look like (Liu et al. 2023, LLM-QAT). They are kept beside the
moments; how they are dealt out does not depend on the number of workers.
"""

from typing import Any

import numpy as np

from pipeline.calibration.flow import calibration_key
from pipeline.calibration.job import GenerateText
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.device import Arithmetic
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.planning.cost_model import calibration_bytes, calibration_device_bytes
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage.cache_key import cache_name, versioned
from pipeline.storage.records import read_cached
from pipeline.storage.store import Store
from pipeline.texts.windows import load_tokenizer, opening_of

_BATCH = 16  # windows that are written at a time


def self_generated_windows(
    source: Checkpoint,
    settings: CalibrationSettings,
    cache: str,
    seed: int,
    pools: Pools,
    arithmetic: Arithmetic,
) -> np.ndarray:
    """Windows of the model's own text, int64 [windows, seqlen]; read again if they were written before.

    Raises:
        TextError: the model has no tokenizer to say how its texts begin.
    """
    count, length = settings.calibration_windows, settings.calibration_seqlen
    opening = opening_of(load_tokenizer(source.store.root, settings.trust_remote_code))
    identity = versioned("written", {
        "source": source.fingerprint, "windows": [count, length], "seed": seed, "dtype": settings.calibration_dtype,
        "opening": opening.tolist(), **arithmetic.gpu_identity,
    })  # fmt: skip
    store, name = Store.at(cache), f"{cache_name('written', identity)}.json"
    if store.exists(name):
        return read_cached(store, name, lambda: _windows(store.read_json(name), count, length))
    written: dict[Any, np.ndarray] = {}

    def note(done: TaskResult[np.ndarray]) -> None:
        written[done.task.key] = done.value

    key = calibration_key(source, settings)
    tasks = [
        Task(first, GenerateText(key, min(_BATCH, count - first), length, first, seed, opening), f"text {first}")
        for first in range(0, count, _BATCH)
    ]
    memory = calibration_bytes(source, length, 0)
    device = calibration_device_bytes(source, length, 0, settings.calibration_dtype)
    run_stage(pools, Stage("write text", memory, device, "parts"), tasks, note)
    ids = np.concatenate([written[first] for first in sorted(written)])
    store.write_json(name, ids.tolist())
    return ids


def _windows(ids: Any, count: int, length: int) -> np.ndarray:
    """Token ids as they were written, int64 [count, length]; ValueError if they are none."""
    found = np.array(ids)
    if found.shape != (count, length) or found.dtype != np.int64 or found.min(initial=0) < 0:
        raise ValueError(f"wanted token ids [{count}, {length}], got {found.dtype} {list(found.shape)}")
    return found
