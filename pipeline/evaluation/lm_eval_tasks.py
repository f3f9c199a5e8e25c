"""lm-evaluation-harness behind one door: it asks and scores as ever, and a model elsewhere answers.

lm-eval is given an `Asker`, its own model class for transformers without weights. What that would run through the model leaves it as
batches of requests, cut as the class itself would cut them; an `Answerer`, which has the weights, takes each batch by itself. So whoever
answers which batch, every number is the one that lm-eval gets from the whole model in one process, and all else (few-shot
examples, filters, metrics, groups, errors of measurement) is its own doing.
"""

import contextlib
import difflib
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, set_torch_seed

from pipeline.errors import LmEvalTaskError, NonFiniteLoss, SwscError, first_line
from pipeline.models.loading import ModelKey, load_model, meta_model
from pipeline.models.stored_model import Model, open_model
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.texts.windows import load_tokenizer

SCORES, WRITES = (
    "loglikelihood",
    "generate_until",
)  # the two kinds of requests; a rolling likelihood is made of the first

Request = tuple[
    Any, ...
]  # SCORES: (texts or None, tokens of the context, tokens to score); WRITES: (context, how to generate)


class Answers(Protocol):
    """Whoever has batches of requests answered, in their order."""

    dtype: str

    def require_unseen(self, read: Callable[[], str]) -> None:
        """Raise TextError if the model was calibrated on passages of this text."""

    def __call__(self, kind: str, batches: list[list[Request]], tokens: int, together: bool) -> list[list[Any]]:
        """Answers of each batch, whose longest request has `tokens` tokens; `together`: one after the other, in one place."""


class Asker(HFLM):
    """What lm-eval takes for the model."""

    def __init__(self, source: Model, key: ModelKey, answers: Answers) -> None:
        empty = meta_model(key)
        empty.config._name_or_path = key.location  # what stands in lm-eval's results
        with _unwarned():
            super().__init__(empty, **_manner(key))
        self._answers = answers
        self._calls: list[list[Request]] = []
        self._found: Iterator[list[Any]] | None = None

    def get_model_info(self) -> dict[str, Any]:
        """As of the model that answered."""
        return {**super().get_model_info(), "model_dtype": f"torch.{self._answers.dtype}"}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._twice(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._twice(super().loglikelihood_rolling, requests)

    def _twice(self, ask: Any, requests: list[Instance]) -> list[Any]:
        """Do as HFLM does, once to learn what it would run through the model, and once with the answers."""
        self._answers.require_unseen(partial(_text_of, requests))
        self._calls, self._found = [], None
        ask(requests, disable_tqdm=True)
        places = [(call, batch) for call, asked in enumerate(self._calls) for batch in _batches(asked, self.batch_size)]
        batches = [[self._calls[call][index] for index in batch] for call, batch in places]
        longest = max(len(context) + len(scored) for batch in batches for _, context, scored in batch)
        answers = self._answers(SCORES, batches, min(longest, self.max_length), together=False)
        found: list[list[Any]] = [[None] * len(asked) for asked in self._calls]
        for (call, batch), answered in zip(places, answers, strict=True):
            for index, answer in zip(batch, answered, strict=True):
                found[call][index] = answer
        self._found = iter(found)
        return ask(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> list[Any]:
        if self._found is not None:
            return next(self._found)
        self._calls.append(list(requests))
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._answers.require_unseen(partial(_text_of, requests))
        asked = [request.args for request in requests]
        lengths = {context: len(self.tok_encode(context)) for context, _ in asked}
        order = Collator(
            asked, sort_fn=lambda r: (-lengths[r[0]], r[0]), group_by="gen_kwargs", group_fn=lambda r: r[1]
        )
        batches: list[list[Request]] = list(order.get_batched(n=self.batch_size))
        room = max(normalize_gen_kwargs(how, self.max_gen_toks)["max_gen_toks"] for _, how in asked)
        drawn = any(how.get("do_sample") for _, how in asked)  # from one stream of random numbers, batch after batch
        answers = self._answers(WRITES, batches, min(max(lengths.values()) + room, self.max_length), together=drawn)
        return order.get_original([answer for batch in answers for answer in batch])


def _text_of(requests: Sequence[Instance]) -> str:
    """All that is asked, each text once."""
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in requests)
    return "\n".join(dict.fromkeys(texts))


def _batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Requests (their indices) that HFLM would answer by one forward pass of `size` rows.

    Those whose tokens differ in the last one at most share a row, that of the longest continuation; long rows come first.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, context, scored) in enumerate(requests):
        rows[(*context, *scored[:-1])].append(index)

    def place(row: list[int]) -> tuple[int, list[int]]:
        _, context, scored = requests[max(row, key=lambda index: len(requests[index][2]))]
        return -len(context) - len(scored), [*context, *scored]

    ordered = sorted(rows.values(), key=place)
    starts = range(0, len(ordered), size)
    return [[index for row in ordered[start : start + size] for index in row] for start in starts]


class Answerer:
    """The model itself."""

    def __init__(self, key: ModelKey, device: str) -> None:
        self.key = key
        model = load_model(open_model(key.location, key.known), key, device)
        with _unwarned():
            self._lm = HFLM(model, **_manner(key))

    @property
    def dtype(self) -> str:
        """torch's name of the model's arithmetic."""
        return str(self._lm.model.dtype).removeprefix("torch.")

    def answers(self, kind: str, batches: Sequence[list[Request]], seed: int | None) -> list[list[Any]]:
        """Answers to batches of SCORES, (log-likelihood, whether it is the likeliest) each, or of WRITES, texts.

        Raises:
            NonFiniteLoss: a log-likelihood is NaN.
        """
        if seed is not None:
            set_torch_seed(seed)
        return [(self._scores if kind == SCORES else self._texts)(batch) for batch in batches]

    def _scores(self, batch: list[Request]) -> list[Any]:
        found = self._lm._loglikelihood_tokens(batch, disable_tqdm=True)
        if any(math.isnan(score) for score, _ in found):
            raise NonFiniteLoss(
                f"{self.key.location}: a log-likelihood is NaN; the model is broken, nothing is dropped"
            )
        return found

    def _texts(self, batch: list[Request]) -> list[Any]:
        asked = [Instance(WRITES, {}, request, index) for index, request in enumerate(batch)]
        return self._lm.generate_until(asked, disable_tqdm=True)


def _manner(key: ModelKey) -> dict[str, Any]:
    """How HFLM is made, with weights and without."""
    tokenizer = load_tokenizer(key.location, key.trusted)
    return {"backend": "causal", "tokenizer": tokenizer, "batch_size": key.batch_size}


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without HFLM's warnings that it is given a model and not the name of one."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_lm_eval(settings: LmEvalSettings, asker: Asker) -> dict[str, Any]:
    """lm-eval's own results, as it would write them.

    Raises:
        TaskError: a task that is not there, or whose description or data lm-eval cannot use.
    """
    manager = _index(settings.include_path)
    names = [name for given in settings.tasks for name in _named(manager, given, settings.include_path)]
    os.environ["DISABLE_MULTIPROC"] = (
        "1"  # bootstrapping would fork this process, and Ray's threads do not survive that
    )
    python, numpy, torch, fewshot = settings.seed
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it says what it is at in the midst of results
            results = simple_evaluate(
                model=asker, tasks=names, task_manager=manager, num_fewshot=settings.num_fewshot, limit=settings.limit,
                batch_size=settings.batch_size, log_samples=False, random_seed=python, numpy_random_seed=numpy,
                torch_random_seed=torch, fewshot_random_seed=fewshot,
            )  # fmt: skip
    except SwscError:
        raise
    except Exception as error:  # of a task's own code, a template, a data set that is not there: it has no common root
        reason = first_line(error)
        raise LmEvalTaskError(
            f"tasks {', '.join(names)}: lm-eval cannot run them: {type(error).__name__}: {reason}"
        ) from None
    return json.loads(json.dumps(results, default=handle_non_serializable))


@lru_cache
def _index(folder: str | None) -> TaskManager:
    """All tasks that lm-eval knows, and those of a directory: 14,000 files, which take seconds to read."""
    return TaskManager(include_path=folder)


def _named(manager: TaskManager, given: str, folder: str | None) -> list[str]:
    """Names that lm-eval knows: one, or those of a pattern."""
    if given in manager.task_index or Path(given).is_file():
        return [given]
    if found := manager.match_tasks([given]):
        return list(found)
    like = difflib.get_close_matches(given, manager.all_tasks)
    hint = (
        f"there is {', '.join(like)}"
        if like
        else "see `lm-eval ls tasks`, or give a directory of YAML files by --include-path"
    )
    raise LmEvalTaskError(f"task {given}: lm-eval knows none of this name; {_unreadable(folder) or hint}")


def _unreadable(folder: str | None) -> str:
    """What is wrong with a directory's task files, which lm-eval passes over in silence."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return f"{file} cannot be read: {' '.join(str(error).split())}"
    return ""


def tables(results: dict[str, Any]) -> str:
    """lm-eval's tables of tasks and groups."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)
