"""lm-evaluation-harness flow: distributes batches of requests over workers, and returns answers in lm-eval's order."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np

from pipeline.blocks.layout import LayerSizes, layout_within
from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.engine.memory import Room, WorkerMemory, largest
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import TaskList, execute
from pipeline.engine.stage import Pools, Stage
from pipeline.engine.task import Pool, Task, TaskResult
from pipeline.errors import ConfigError
from pipeline.evaluation.flow import model_key, require_unseen
from pipeline.evaluation.lm_eval_blocks import score_in_blocks
from pipeline.evaluation.lm_eval_harness import harness
from pipeline.evaluation.lm_eval_job import AnswerRequests, RequestAnswers
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.planning.memory import block_memory, evaluation_memory
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


_NO_MEMORY = WorkerMemory()


def require_answerable(model: Model, settings: LmEvalSettings, pools: Pools) -> None:
    """Raise ConfigError that names the tasks that generate texts, if a worker cannot hold the whole model.

    Log-likelihoods are computed in blocks then. Texts are not, because every token would pass all blocks.
    """
    memory, room = evaluation_memory(model, settings.dtype, settings.batch_size), pools.room()
    if not room.holds(memory) and (names := harness().generating_tasks(settings)):
        raise _generation_refused(names, room, memory)


def _generation_refused(names: Sequence[str], room: Room, memory: WorkerMemory) -> ConfigError:
    return ConfigError(
        f"tasks {', '.join(names)}: they generate texts, which needs the whole model in a worker"
        f" ({memory.limited(room.kind) / 1e9:.1f} GB), and a worker may hold {room.nbytes / 1e9:.1f} GB; raise"
        " --memory-per-worker, use larger workers, or choose tasks of log-likelihoods"
    )


@dataclass(frozen=True)
class _PoolSize:
    """Number of tasks, and memory of a worker, that a pool was started for."""

    tasks: int = 0
    memory: WorkerMemory = _NO_MEMORY

    def covers(self, needed: "_PoolSize") -> bool:
        return self == self.enlarged(needed)

    def enlarged(self, needed: "_PoolSize") -> "_PoolSize":
        return _PoolSize(max(self.tasks, needed.tasks), largest([self.memory, needed.memory]))


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
        scored = kind == harness().LOGLIKELIHOOD
        if scored:
            self._require_known_tokens(batches)
        memory = evaluation_memory(self._model, self._key.dtype, self._key.batch_size * max_tokens)
        if self._pools.room().holds(memory):
            return self._answer_whole(self._tasks(kind, batches, one_worker), memory, kind)
        if not scored:
            raise _generation_refused(self._settings.tasks, self._pools.room(), memory)
        return self._answer_in_blocks(batches, max_tokens, kind)

    def _answer_whole(self, tasks: list[Task[RequestAnswers]], memory: WorkerMemory, kind: str) -> list[list[Any]]:
        """Answers of workers that hold the whole model."""
        answers: dict[int, list[list[Any]]] = {}

        def on_done(done: TaskResult[RequestAnswers]) -> None:
            answers[done.task.key] = done.value.answers
            self.dtype = done.value.dtype

        source = TaskList(tasks, on_done)
        pool = self._pool_for(_PoolSize(len(tasks), memory))
        with Progress(kind, len(tasks), 0, unit="parts") as progress:
            execute(pool, source, progress)
        source.raise_failures()
        return [batch for start in sorted(answers) for batch in answers[start]]

    def _answer_in_blocks(self, batches: list[list[Any]], max_tokens: int, kind: str) -> list[list[Any]]:
        """Answers of workers that hold one block of the model at a time."""
        size = -(-len(batches) // _TASKS)
        parts = [batches[start : start + size] for start in range(0, len(batches), size)]
        tokens, room = self._key.batch_size * max_tokens, self._pools.room()
        working = block_memory(self._model, self._key.dtype, tokens, tokens * size)
        layout = layout_within(room, self._key, LayerSizes.of(self._model, self._key, room.kind), working)
        pool = self._pool_for(_PoolSize(min(len(parts), len(layout.blocks)), working + layout.weights))
        answers = score_in_blocks(self._key, layout, parts, kind, pool)
        self.dtype = answers[0].dtype
        return [batch for part in answers for batch in part.answers]

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
            self._pool = self._pools(size.tasks, Stage("tasks", size.memory, "parts", keeps_model=True))
        return self._pool
