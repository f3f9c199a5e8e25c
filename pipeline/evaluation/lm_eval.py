"""Tasks of lm-evaluation-harness on workers: requests dealt out batch by batch, answers put together in lm-eval's order."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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

_PARTS = 256  # that requests are dealt out in: enough for many workers, few enough to cost nothing themselves


def require_harness(settings: LmEvalSettings) -> None:
    """Raise ConfigError if lm-eval is not installed, or if there is no such directory of tasks."""
    harness()
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise ConfigError(
            f"include_path {settings.include_path}: no such directory; give one that holds tasks as YAML files"
        )


def evaluate_lm_eval(
    location: str, settings: LmEvalSettings, pools: Pools, known: SourceDigests | None = None
) -> dict[str, Any]:
    """What lm-eval finds of the dense or compressed model at `location`.

    Returns {"model", "lm_eval": lm-eval's own results, "tables": as it prints them, "seconds"}.

    Raises:
        ConfigError: lm-eval is not installed. CheckpointError: the model cannot be opened.
        TaskError: a task that is not there, or cannot be carried out. RunError: a part of the requests failed.
    """
    started = time.perf_counter()
    require_harness(settings)
    lm_eval = harness()
    model = open_model(location, known)
    key = model_key(model.checkpoint, settings)
    with PooledAnswers(model, key, settings, pools) as answers:
        results = lm_eval.run_lm_eval(settings, lm_eval.Asker(model, key, answers))
    return {
        "model": location,
        "lm_eval": results,
        "tables": lm_eval.tables(results),
        "seconds": time.perf_counter() - started,
    }


class PooledAnswers:
    """Has requests answered by a pool, which is begun by the first of them; a context manager."""

    def __init__(self, model: Model, key: ModelKey, settings: LmEvalSettings, pools: Pools) -> None:
        self.dtype = ""
        self._model, self._key, self._settings, self._pools = model, key, settings, pools
        self._pool: Pool | None = None
        self._made_for = (0, 0, 0)  # tasks, bytes, bytes on a GPU

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.close()

    def require_unseen(self, read: Callable[[], str]) -> None:
        """As pipeline.evaluation.lm_eval_tasks.Answers says."""
        require_unseen(self._model, read, f"of tasks {', '.join(self._settings.tasks)}")

    def __call__(self, kind: str, batches: list[list[Any]], tokens: int, together: bool) -> list[list[Any]]:
        """As pipeline.evaluation.lm_eval_tasks.Answers says."""
        if kind == harness().SCORES:
            most = max((max(part, default=0) for batch in batches for _, *parts in batch for part in parts), default=0)
            require_within(np.array([[most]]), self._model.checkpoint)
        seed = self._settings.seed[2] if together else None  # that of torch: lm-eval sets it before anything is drawn
        size = len(batches) if together else -(-len(batches) // _PARTS)
        tasks = [
            Task(
                start,
                AnswerRequests(self._key, kind, batches[start : start + size], seed),
                f"{kind}, batches {start} to {min(start + size, len(batches)) - 1}",
            )
            for start in range(0, len(batches), size)
        ]
        found: dict[int, list[list[Any]]] = {}

        def note(done: TaskResult[RequestAnswers]) -> None:
            found[done.task.key] = done.value.answers
            self.dtype = done.value.dtype

        source = TaskList(tasks, note)
        asked = self._model, self._key.dtype, self._key.batch_size * tokens
        pool = self._pool_for(len(tasks), evaluation_bytes(*asked), evaluation_device_bytes(*asked))
        with Progress(kind, len(tasks), 0, "parts") as progress:
            execute(pool, source, progress)
        source.raise_failures()
        return [answers for start in sorted(found) for answers in found[start]]

    def _pool_for(self, tasks: int, memory: int, device: int) -> Pool:
        """The pool that is there, with its loaded models, or a larger one where it was made for less."""
        needs, before = (tasks, memory, device), self._made_for
        if self._pool is None or any(need > size for need, size in zip(needs, before, strict=True)):
            if self._pool:
                self._pool.close()
                self._pool = None
            self._made_for = max(tasks, before[0]), max(memory, before[1]), max(device, before[2])
            tasks, memory, device = self._made_for
            self._pool = self._pools(tasks, Stage("tasks", memory, device, "parts", keeps_model=True))
        return self._pool
