"""Whether lm-evaluation-harness is there: an extra of the package, wanted by the driver and by every worker."""

from importlib import import_module
from typing import Any

from pipeline.errors import ConfigError


def harness() -> Any:
    """The module pipeline.evaluation.lm_eval_tasks; ConfigError if lm-eval is not installed."""
    try:
        return import_module("pipeline.evaluation.lm_eval_tasks")
    except ImportError as error:
        raise ConfigError(
            f"tasks want lm-evaluation-harness ({error}): pip install 'swsc[lm-eval]', on every node"
        ) from None
