"""Adapter of lm-evaluation-harness: lm-eval builds requests and scores answers, workers run the model.

This module and `lm_eval_answerer.py` alone import lm-eval.

lm-eval receives a `RemoteModel`, a subclass of its own model class for transformers without weights. The requests that
this class would run through the model are sent to workers instead, in the batches that the class itself would form. On
a worker, an `Answerer` with the weights answers each batch independently. Every number therefore equals that of lm-eval
with the whole model in one process, whichever worker answers a batch. Few-shot examples, filters, metrics, groups and
standard errors are computed by lm-eval.
"""

import difflib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from pipeline.errors import LmEvalTaskError, SwscError, first_line
from pipeline.evaluation.lm_eval_answerer import (
    GENERATE,
    LOGLIKELIHOOD,
    Request,
    model_arguments,
    without_warnings,
)
from pipeline.models.loading import ModelKey, meta_model
from pipeline.settings.lm_eval import LmEvalSettings
from swsc_core.storage.json_fields import JsonObject


class RequestBackend(Protocol):
    """Answers batches of requests.

    Attributes:
        dtype: torch name of the dtype of the model that answered.
    """

    dtype: str

    def require_unseen(self, read: Callable[[], str]) -> None:
        """Raise TextError if the model was calibrated on passages of the text that `read` returns."""

    def answer(self, kind: str, batches: list[list[Request]], max_tokens: int, one_worker: bool) -> list[list[Any]]:
        """Answers of each batch, in order.

        Args:
            max_tokens: length of the longest request, with its answer.
            one_worker: one worker has to answer all batches in order, because they share a random number generator.
        """


class RemoteModel(HFLM):
    """The model that lm-eval sees: HFLM without weights, whose requests a backend answers."""

    def __init__(self, key: ModelKey, backend: RequestBackend) -> None:
        empty = meta_model(key)
        empty.config._name_or_path = key.location  # the name in lm-eval's results
        with without_warnings():
            super().__init__(empty, **model_arguments(key))
        self._backend = backend
        # Requests of each call of `_loglikelihood_tokens` in the first pass, and the answers that it returns in the
        # second.
        self._calls: list[list[Request]] = []
        self._answers: Iterator[list[Any]] | None = None

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's description of the model, with the dtype of the model that answered."""
        return {**super().get_model_info(), "model_dtype": f"torch.{self._backend.dtype}"}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._with_answers(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._with_answers(super().loglikelihood_rolling, requests)

    def _with_answers(self, ask: Any, requests: list[Instance]) -> list[Any]:
        """Run a method of HFLM twice: first to record what it would run through the model, then with the answers."""
        self._backend.require_unseen(partial(_text_of, requests))
        self._calls, self._answers = [], None
        ask(requests, disable_tqdm=True)
        self._answers = iter(self._answer_calls())
        results: list[Any] = ask(requests, disable_tqdm=True)
        return results

    def _answer_calls(self) -> list[list[Any]]:
        """Answers to all recorded requests, call by call."""
        positions = [
            (call, batch) for call, requests in enumerate(self._calls) for batch in _batches(requests, self.batch_size)
        ]
        batches = [[self._calls[call][index] for index in batch] for call, batch in positions]
        longest = max(len(context) + len(scored) for batch in batches for _, context, scored in batch)
        answered = self._backend.answer(LOGLIKELIHOOD, batches, min(longest, self.max_length), one_worker=False)
        answers: list[list[Any]] = [[None] * len(requests) for requests in self._calls]
        for (call, batch), batch_answers in zip(positions, answered, strict=True):
            for index, answer in zip(batch, batch_answers, strict=True):
                answers[call][index] = answer
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> list[Any]:
        if self._answers is not None:
            return next(self._answers)
        self._calls.append(list(requests))
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._backend.require_unseen(partial(_text_of, requests))
        arguments = [request.args for request in requests]
        lengths = {context: len(self.tok_encode(context)) for context, _ in arguments}
        order = Collator(
            arguments, sort_fn=lambda r: (-lengths[r[0]], r[0]), group_by="gen_kwargs", group_fn=lambda r: r[1]
        )
        batches: list[list[Request]] = list(order.get_batched(n=self.batch_size))
        new_tokens = max(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"] for _, options in arguments)
        # All samples come from one random number generator, batch after batch.
        sampled = any(options.get("do_sample") for _, options in arguments)
        max_tokens = min(max(lengths.values()) + new_tokens, self.max_length)
        answers = self._backend.answer(GENERATE, batches, max_tokens, one_worker=sampled)
        texts: list[str] = order.get_original([answer for batch in answers for answer in batch])
        return texts


def _text_of(requests: Sequence[Instance]) -> str:
    """The text of all requests, each text once."""
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in requests)
    return "\n".join(dict.fromkeys(texts))


def _batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Batches of request indices that HFLM would answer by one forward pass of `size` rows each.

    Requests that differ at most in their last token share a row. Rows are sorted by length, the longest first.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, context, scored) in enumerate(requests):
        rows[(*context, *scored[:-1])].append(index)

    def sort_key(row: list[int]) -> tuple[int, list[int]]:
        _, context, scored = requests[max(row, key=lambda index: len(requests[index][2]))]
        return -len(context) - len(scored), [*context, *scored]

    ordered = sorted(rows.values(), key=sort_key)
    starts = range(0, len(ordered), size)
    return [[index for row in ordered[start : start + size] for index in row] for start in starts]


def run_lm_eval(settings: LmEvalSettings, model: RemoteModel) -> JsonObject:
    """lm-eval's own results, as it writes them to JSON.

    Raises:
        LmEvalTaskError: a task does not exist, or lm-eval cannot use its description or its data.
    """
    manager, names = _task_manager(settings.include_path), _task_names(settings)
    # Bootstrapping would fork this process, and the threads of Ray do not survive a fork.
    os.environ["DISABLE_MULTIPROC"] = "1"
    python, numpy, torch, fewshot = settings.seed
    with _task_errors(names):
        results = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            log_samples=False,
            random_seed=python,
            numpy_random_seed=numpy,
            torch_random_seed=torch,
            fewshot_random_seed=fewshot,
        )
    written: JsonObject = json.loads(json.dumps(results, default=handle_non_serializable))
    return written


def generating_tasks(settings: LmEvalSettings) -> list[str]:
    """Names of the tasks for which the model generates texts. Raises LmEvalTaskError as `run_lm_eval` does."""
    names = _task_names(settings)
    with _task_errors(names):
        tasks = _task_manager(settings.include_path).load(names)["tasks"]
    return sorted(name for name, task in tasks.items() if task.OUTPUT_TYPE == GENERATE)


@contextmanager
def _task_errors(names: Sequence[str]) -> Iterator[None]:
    """Convert errors of lm-eval to LmEvalTaskError, and send what it prints to stderr: stdout is for results."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SwscError:
        raise
    except Exception as error:  # task code, templates and missing data sets raise errors without a common class
        reason = first_line(error)
        raise LmEvalTaskError(
            f"tasks {', '.join(names)}: lm-eval cannot run them: {type(error).__name__}: {reason}"
        ) from None


def _task_names(settings: LmEvalSettings) -> list[str]:
    manager, folder = _task_manager(settings.include_path), settings.include_path
    return [name for given in settings.tasks for name in _matching_tasks(manager, given, folder)]


@lru_cache
def _task_manager(folder: str | None) -> TaskManager:
    """Manager of lm-eval's tasks and of those in `folder`. Cached: it reads 14,000 files in several seconds."""
    return TaskManager(include_path=folder)


def _matching_tasks(manager: TaskManager, given: str, folder: str | None) -> list[str]:
    """Names of the tasks that `given` stands for: a name, a pattern or a YAML file. LmEvalTaskError if none."""
    if given in manager.task_index or Path(given).is_file():
        return [given]
    if matching := manager.match_tasks([given]):
        return list(matching)
    similar = difflib.get_close_matches(given, manager.all_tasks)
    hint = (
        f"similar names: {', '.join(similar)}"
        if similar
        else "see `lm-eval ls tasks`, or name a directory of YAML files with --include-path"
    )
    raise LmEvalTaskError(f"task {given}: lm-eval has no task of this name; {_unreadable_file(folder) or hint}")


def _unreadable_file(folder: str | None) -> str:
    """Error of the first task file in `folder` that cannot be read, which lm-eval ignores; "" if there is none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return f"{file} cannot be read: {' '.join(str(error).split())}"
    return ""


def tables(results: JsonObject) -> str:
    """lm-eval's tables of tasks and groups, as text."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)
