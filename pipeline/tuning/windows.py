"""Windows of a tuning: batches to train on, and windows held out to measure whether tuning helped."""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError

# Tokens of the windows of one step.
_STEP_TOKENS = 2048
# One window of this many is held out.
_HELD_OUT = 8


@dataclass(frozen=True)
class TuningWindows:
    """Windows of the calibration text, and how often and in which order they are used.

    Attributes:
        ids: int64 [windows, seqlen], at least two windows.
        epochs: passes over the windows that are not held out.
        seed: of the order within each pass.
    """

    ids: np.ndarray
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.ids) < 2:
            raise ConfigError(
                f"tuning needs at least 2 calibration windows, one of them held out, got {len(self.ids)}; raise"
                " --calibration-windows"
            )

    @property
    def held_out(self) -> range:
        """Indices of the windows that are held out: the last ones of the text."""
        return range(len(self.ids) - max(1, len(self.ids) // _HELD_OUT), len(self.ids))

    def batches(self) -> list[list[int]]:
        """Indices of the windows of each step."""
        training = len(self.ids) - len(self.held_out)
        size = min(training, max(1, _STEP_TOKENS // self.ids.shape[1]))
        generator = np.random.default_rng(self.seed)
        order = np.concatenate([generator.permutation(training) for _ in range(self.epochs)])
        return [order[start : start + size].tolist() for start in range(0, len(order) - size + 1, size)]
