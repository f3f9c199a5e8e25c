"""Access to lm-evaluation-harness, an optional dependency that the driver and every worker need for tasks."""

from importlib import import_module
from typing import Any

from pipeline.errors import ConfigError


def harness() -> Any:
    """The module pipeline.evaluation.lm_eval_tasks. Raises ConfigError if lm-eval is not installed."""
    try:
        return import_module("pipeline.evaluation.lm_eval_tasks")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness ({error}): run `pip install 'swsc[lm-eval]'` on every node"
        ) from None
