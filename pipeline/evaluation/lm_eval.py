"""lm-evaluation-harness flow: distributes batches of requests over workers, and returns answers in lm-eval's order."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np

from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import ConfigError
from pipeline.evaluation.flow import model_key, require_unseen
from pipeline.evaluation.lm_eval_harness import harness
from pipeline.evaluation.lm_eval_job import AnswerRequests, RequestAnswers
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.planning.cost_model import evaluation_bytes, evaluation_device_bytes
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.texts.windows import require_within
from swsc_core.storage.json_fields import JsonObject

# Tasks that requests of one kind are divided into: enough for many workers, few enough that their overhead does not
# matter.
_TASKS = 256


def require_harness(settings: LmEvalSettings) -> None:
    """Raise ConfigError if lm-eval is not installed, or if the directory of --include-path does not exist."""
    harness()
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise ConfigError(
            f"include_path {settings.include_path}: no such directory; name a directory with tasks as YAML files"
        )


class LmEvalResult(TypedDict):
    """Results of an lm-eval run.

    `lm_eval` holds lm-eval's own results, and `tables` the tables that it prints for them.
    """

    model: str
    lm_eval: JsonObject
    tables: str
    seconds: float


@dataclass(frozen=True)
class _PoolSize:
    """Number of tasks, and bytes on a worker and on its GPU, that a pool was started for."""

    tasks: int = 0
    memory: int = 0
    device: int = 0

    def covers(self, needed: "_PoolSize") -> bool:
        return self.tasks >= needed.tasks and self.memory >= needed.memory and self.device >= needed.device

    def enlarged(self, needed: "_PoolSize") -> "_PoolSize":
        return _PoolSize(
            max(self.tasks, needed.tasks), max(self.memory, needed.memory), max(self.device, needed.device)
        )


def evaluate_lm_eval(
    location: str, settings: LmEvalSettings, pools: Pools, known: SourceDigests | None = None
) -> LmEvalResult:
    """Results of lm-eval for the dense or compressed model at `location`.

    Args:
        known: digests of a verified model; all bytes that are read are compared with them.

    Raises:
        ConfigError: lm-eval is not installed.
        CheckpointError: the model cannot be opened.
        LmEvalTaskError: a task does not exist, or lm-eval cannot run it.
        RunError: a task of the pool failed.
    """
    started = time.perf_counter()
    require_harness(settings)
    lm_eval = harness()
    model = open_model(location, known)
    key = model_key(model.checkpoint, settings)
    with PooledRequests(model, key, settings, pools) as requests:
        results = lm_eval.run_lm_eval(settings, lm_eval.RemoteModel(key, requests))
    return {
        "model": location,
        "lm_eval": results,
        "tables": lm_eval.tables(results),
        "seconds": time.perf_counter() - started,
    }


class PooledRequests:
    """The `RequestBackend` that answers requests with a pool, which the first requests start. A context manager."""

    def __init__(self, model: Model, key: ModelKey, settings: LmEvalSettings, pools: Pools) -> None:
        self.dtype = ""
        self._model, self._key, self._settings, self._pools = model, key, settings, pools
        self._pool: Pool | None = None
        self._pool_size = _PoolSize()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.close()

    def require_unseen(self, read: Callable[[], str]) -> None:
        """See `lm_eval_tasks.RequestBackend`."""
        require_unseen(self._model, read, f"of tasks {', '.join(self._settings.tasks)}")

    def answer(self, kind: str, batches: list[list[Any]], max_tokens: int, one_worker: bool) -> list[list[Any]]:
        """See `lm_eval_tasks.RequestBackend`."""
        if kind == harness().LOGLIKELIHOOD:
            self._require_known_tokens(batches)
        tasks = self._tasks(kind, batches, one_worker)
        answers: dict[int, list[list[Any]]] = {}

        def on_done(done: TaskResult[RequestAnswers]) -> None:
            answers[done.task.key] = done.value.answers
            self.dtype = done.value.dtype

        source = TaskList(tasks, on_done)
        batch_tokens = self._key.batch_size * max_tokens
        memory = evaluation_bytes(self._model, self._key.dtype, batch_tokens)
        device = evaluation_device_bytes(self._model, self._key.dtype, batch_tokens)
        pool = self._pool_for(_PoolSize(len(tasks), memory, device))
        with Progress(kind, len(tasks), 0, unit="parts") as progress:
            execute(pool, source, progress)
        source.raise_failures()
        return [batch for start in sorted(answers) for batch in answers[start]]

    def _require_known_tokens(self, batches: list[list[Any]]) -> None:
        """Raise TextError if a token of the requests is not in the model's vocabulary."""
        largest = max((max(ids, default=0) for batch in batches for _, *parts in batch for ids in parts), default=0)
        require_within(np.array([[largest]]), self._model.checkpoint)

    def _tasks(self, kind: str, batches: list[list[Any]], one_worker: bool) -> list[Task[RequestAnswers]]:
        # Sampling uses the seed of torch, which lm-eval sets before the first sample.
        seed = self._settings.seed[2] if one_worker else None
        size = len(batches) if one_worker else -(-len(batches) // _TASKS)
        return [
            Task(
                start,
                AnswerRequests(self._key, kind, batches[start : start + size], seed),
                f"{kind}, batches {start} to {min(start + size, len(batches)) - 1}",
            )
            for start in range(0, len(batches), size)
        ]

    def _pool_for(self, needed: _PoolSize) -> Pool:
        """The present pool, with its loaded models, or a larger one if it was started for less."""
        if self._pool is None or not self._pool_size.covers(needed):
            if self._pool:
                self._pool.close()
                self._pool = None
            size = self._pool_size = self._pool_size.enlarged(needed)
            self._pool = self._pools(size.tasks, Stage("tasks", size.memory, size.device, "parts", keeps_model=True))
        return self._pool
