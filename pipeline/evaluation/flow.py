"""Evaluation flow: distributes windows over workers, and adds their losses in the order of the text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from pipeline.blocks.layout import LayerSizes, layout_within
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.source_digests import SourceDigests, digests_of_source
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task
from pipeline.evaluation.blocks_flow import measure_in_blocks
from pipeline.evaluation.job import MeasureLosses, WindowLosses
from pipeline.evaluation.perplexity import perplexity
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.transaction import calibration_hashes
from pipeline.planning.memory import block_memory, evaluation_memory
from pipeline.settings.evaluation import EvaluateSettings, MeasureSettings
from pipeline.texts.contamination import require_uncontaminated
from pipeline.texts.texts import read_text
from pipeline.texts.windows import Windows, make_windows, require_within

# Batches of one task: enough that its overhead does not matter, few enough to keep all workers busy to the end.
_TASK_BATCHES = 4


class EvaluationResult(TypedDict):
    """JSON of `swsc evaluate --json`: perplexity, the loss of each window in nats per token, and the protocol."""

    model: str
    perplexity: float
    nll_per_window: list[float]
    seqlen: int
    windows: int
    text: str
    text_sha256: str
    text_tokens: int
    bos: str
    dtype: str
    batch_size: int
    text_documents: NotRequired[int]
    text_column: NotRequired[str | None]
    seconds: NotRequired[float]


def evaluate_model(
    location: str, settings: EvaluateSettings, pools: Pools, known: SourceDigests | None = None
) -> EvaluationResult:
    """Perplexity of the dense or compressed model at `location`, by the standard protocol (texts/windows.py).

    Args:
        known: digests of a verified model; all bytes that are read are compared with them.

    Raises:
        CheckpointError: the model cannot be opened.
        TextError: the text cannot be cut into windows.
        NonFiniteLoss: the loss of a window is NaN or Inf.
        RunError: a task failed.
    """
    started = time.perf_counter()
    model = open_model(location, known)
    windows = make_windows(location, settings)
    require_measurable(model, windows, settings)
    measurement = Measurement(model, model_key(model.checkpoint, settings), windows, settings)
    losses: dict[int, tuple[float, ...]] = {}
    dtypes: set[str] = set()

    def on_losses(start: int, measured: WindowLosses) -> None:
        losses[start] = measured.losses
        dtypes.add(measured.dtype)

    measurement.run(pools, on_losses)
    ordered = [loss for start in sorted(losses) for loss in losses[start]]
    seconds = time.perf_counter() - started
    result = evaluation_result(location, ordered, windows, settings, ", ".join(sorted(dtypes)))
    return {**result, "seconds": seconds}


@dataclass(frozen=True)
class Measurement:
    """The losses of windows under one model, which each worker holds whole or in blocks."""

    model: Model
    key: ModelKey
    windows: Windows
    settings: EvaluateSettings

    def run(self, pools: Pools, on_losses: Callable[[int, WindowLosses], None]) -> None:
        """Measure all windows; `on_losses` receives the index of the first window of each part, and its losses."""
        parts = batch_parts(self.windows.ids, self.settings)
        tokens = self.settings.batch_size * self.settings.seqlen
        memory = evaluator_memory(self.model, self.settings)
        room, stage = pools.room(), Stage("evaluate", memory, "parts", keeps_model=True)
        working = block_memory(self.model, self.settings.dtype, tokens, max(part.size for _, part in parts))
        if not room.holds(memory):
            layout = layout_within(room, self.key, LayerSizes.of(self.model, self.key, room.kind), working)
            measure_in_blocks(self.key, layout, working, parts, pools, on_losses)
            return
        tasks = [
            Task(start, MeasureLosses(self.key, part), f"windows {start} to {start + len(part) - 1}", work=len(part))
            for start, part in parts
        ]
        run_stage(pools, stage, tasks, lambda done: on_losses(done.task.key, done.value))


def require_measurable(model: Model, windows: Windows, settings: EvaluateSettings) -> None:
    """Raise TextError if the model has too few positions or tokens for the windows, or was calibrated on their text."""
    require_within(windows.ids, model.checkpoint)
    require_unseen(model, lambda: read_text(settings.text, settings.text_column), settings.text)


def require_unseen(model: Model, read: Callable[[], str], name: str) -> None:
    """Raise TextError if the model was calibrated on passages of the evaluation text `name`.

    `read` returns the text; it is called only if the model was calibrated.
    """
    if hashes := calibration_hashes(model.checkpoint.store):
        require_uncontaminated(hashes, read(), name)


def evaluator_memory(model: Model, settings: EvaluateSettings) -> WorkerMemory:
    """What a worker needs that evaluates the whole `model`."""
    return evaluation_memory(model, settings.dtype, settings.batch_size * settings.seqlen)


def model_key(checkpoint: Checkpoint, settings: MeasureSettings) -> ModelKey:
    """Key under which workers load the model that is evaluated."""
    known = digests_of_source(checkpoint)
    return ModelKey(checkpoint.store.root, settings.dtype, settings.batch_size, settings.trust_remote_code, known)


def batch_parts(ids: np.ndarray, settings: EvaluateSettings) -> list[tuple[int, np.ndarray]]:
    """The windows in parts of whole batches, each with the index of its first window.

    The parts do not depend on the number of workers.
    """
    batch = settings.batch_size
    size = batch * _TASK_BATCHES if len(ids) > 2 * _TASK_BATCHES * batch else batch
    return [(start, ids[start : start + size]) for start in range(0, len(ids), size)]


def evaluation_result(
    location: str, losses: list[float], windows: Windows, settings: EvaluateSettings, dtype: str
) -> EvaluationResult:
    """The result of an evaluation, without its time. Raises NonFiniteLoss if the loss of a window is NaN or Inf."""
    result: EvaluationResult = {
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
    }
    if windows.documents is not None:
        result |= {"text_documents": windows.documents, "text_column": windows.column}
    return result
