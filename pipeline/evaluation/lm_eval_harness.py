"""Access to lm-evaluation-harness, an optional dependency that the driver and every worker need for tasks."""

from importlib import import_module
from typing import Any

from pipeline.errors import ConfigError


def harness() -> Any:
    """The module pipeline.evaluation.lm_eval_tasks. Raises ConfigError if lm-eval is not installed."""
    return _imported("lm_eval_tasks")


def answerers() -> Any:
    """The module pipeline.evaluation.lm_eval_answerer. Raises ConfigError if lm-eval is not installed."""
    return _imported("lm_eval_answerer")


def _imported(module: str) -> Any:
    try:
        return import_module(f"pipeline.evaluation.{module}")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness ({error}): run `pip install 'swsc[lm-eval]'` on every node"
        ) from None
