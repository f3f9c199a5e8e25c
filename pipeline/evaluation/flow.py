"""Perplexity of a model on workers: windows dealt out, losses added up in the order of the text."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import SourceDigests, digests_of_source
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.evaluation.perplexity import perplexity
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.transaction import known_traces
from pipeline.planning.cost_model import evaluation_bytes, evaluation_device_bytes
from pipeline.settings.evaluation import EvaluateSettings, MeasureSettings
from pipeline.texts.contamination import require_apart
from pipeline.texts.texts import read_text
from pipeline.texts.windows import Windows, make_windows, require_within

_BATCHES = 4  # of one task: enough to hide its cost, few enough to share the work out evenly


def evaluate_model(
    location: str, settings: EvaluateSettings, pools: Pools, known: SourceDigests | None = None
) -> dict[str, Any]:
    """Perplexity of the dense or compressed model at `location`, by the standard protocol (measure/windows.py).

    `known`: digests of a model that was verified, which all that is read of it is held against.

    Returns the values that `swsc evaluate --json` writes: perplexity, loss of each window, and the protocol.

    Raises:
        CheckpointError: the model cannot be opened. TextError: the text cannot be cut.
        NonFiniteLoss: a window's loss is NaN or Inf.
        RunError: a task failed.
    """
    started = time.perf_counter()
    model = open_model(location, known)
    windows = make_windows(location, settings)
    require_measurable(model, windows, settings)
    key = model_key(model.checkpoint, settings)
    losses: dict[int, tuple[float, ...]] = {}
    dtypes: set[str] = set()
    tasks = [
        Task(start, MeasureLosses(key, part), f"windows {start} to {start + len(part) - 1}")
        for start, part in batch_parts(windows.ids, settings)
    ]

    def note(done: TaskResult[WindowLosses]) -> None:
        losses[done.task.key] = done.value.losses
        dtypes.add(done.value.dtype)

    memory, device = evaluator_bytes(model, settings), evaluator_device_bytes(model, settings)
    run_stage(pools, Stage("evaluate", memory, device, "parts", keeps_model=True), tasks, note)
    ordered = [loss for start in sorted(losses) for loss in losses[start]]
    seconds = time.perf_counter() - started
    return evaluation_result(location, ordered, windows, settings, ", ".join(sorted(dtypes))) | {"seconds": seconds}


def require_measurable(model: Model, windows: Windows, settings: EvaluateSettings) -> None:
    """Raise TextError for windows that the model has no rows for, or whose text it was calibrated on."""
    require_within(windows.ids, model.checkpoint)
    require_unseen(model, lambda: read_text(settings.text, settings.text_column), settings.text)


def require_unseen(model: Model, read: Callable[[], str], name: str) -> None:
    """Raise TextError if the model was calibrated on passages of the text `name` that it is to be measured on."""
    if found := known_traces(model.checkpoint.store):
        require_apart(found, read(), name)


def evaluator_bytes(model: Model, settings: EvaluateSettings) -> int:
    """Peak memory of a worker that measures `model`."""
    return evaluation_bytes(model, settings.dtype, settings.batch_size * settings.seqlen)


def evaluator_device_bytes(model: Model, settings: EvaluateSettings) -> int:
    """What of it lies on a GPU, if the worker has one."""
    return evaluation_device_bytes(model, settings.dtype, settings.batch_size * settings.seqlen)


def model_key(checkpoint: Checkpoint, settings: MeasureSettings) -> ModelKey:
    """How workers name the loaded model."""
    known = digests_of_source(checkpoint)
    return ModelKey(checkpoint.store.root, settings.dtype, settings.batch_size, settings.trust_remote_code, known)


def batch_parts(ids: np.ndarray, settings: EvaluateSettings) -> list[tuple[int, np.ndarray]]:
    """Parts of the windows with the index of their first: whole batches, cut alike for any number of workers."""
    size = settings.batch_size * _BATCHES if len(ids) > 2 * _BATCHES * settings.batch_size else settings.batch_size
    return [(start, ids[start : start + size]) for start in range(0, len(ids), size)]


def evaluation_result(
    location: str, losses: list[float], windows: Windows, settings: EvaluateSettings, dtype: str
) -> dict[str, Any]:
    """What is said of a measurement; raises NonFiniteLoss for a window that has no finite loss."""
    return {
        "model": location,
        "perplexity": perplexity(losses, location),
        "nll_per_window": losses,
        "seqlen": settings.seqlen,
        "windows": len(losses),
        "text": windows.text,
        "text_sha256": windows.text_sha256,
        "text_tokens": windows.text_tokens,
        "bos": windows.bos,
        "dtype": dtype,
        "batch_size": settings.batch_size,
        **({} if windows.documents is None else {"text_documents": windows.documents, "text_column": windows.column}),
    }
