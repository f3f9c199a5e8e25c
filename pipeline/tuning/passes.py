"""What a step of tuning asks of the models: passes over windows, whose results do not depend on where they run."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.engine.scheduler import TaskRound, TaskSource
from pipeline.engine.stage import Stage
from pipeline.engine.task import Pool, Task
from pipeline.tuning.job import Divergence, MeasureDivergence, TuneGradients
from pipeline.tuning.tuner import TuneKey

# Handles of the payloads that hold a state, one for each of `Passes.parts`; empty before the first step.
State = tuple[Any, ...]
# Executes all tasks of a source.
Run = Callable[[TaskSource], None]


class Sweep(TaskSource, Protocol):
    """One pass of some windows. Its results exist when all tasks have ended."""

    @property
    def divergences(self) -> list[Divergence]:
        """Divergence on each window."""

    def gradients(self, part: int) -> list[Any]:
        """Handles of the gradients of the values of a part, one for each window."""


class Passes(Protocol):
    """Passes over windows, by workers that hold whole models or blocks of them."""

    @property
    def stage(self) -> Stage:
        """The stage of the pool."""

    @property
    def parts(self) -> Sequence[tuple[str, ...] | None]:
        """Names of the matrices whose values form one payload each; None: all matrices."""

    def n_workers(self, batch_size: int) -> int:
        """Number of workers that can be busy with a batch of windows."""

    @property
    def n_preparing(self) -> int:
        """Number of tasks of `prepare`."""

    def n_tasks(self, windows: int, backward: bool) -> int:
        """Number of tasks of a sweep."""

    def prepare(self, pool: Pool, run: Run) -> None:
        """Compute what all sweeps need. Sweeps run on this pool."""

    def sweep(self, step: int, windows: Sequence[int], state: State, backward: bool) -> Sweep:
        """Divergence on windows with the values after `step` steps.

        Args:
            windows: indices of the windows.
            state: holds these values, unless `step` is 0.
            backward: also compute gradients.
        """


class WholeModelPasses:
    """Passes by workers that hold both models; each window is one task."""

    def __init__(self, key: TuneKey, ids: np.ndarray, stage: Stage) -> None:
        """`ids`: all windows, int64 [windows, seqlen]."""
        self.stage, self.parts, self.n_preparing = stage, (None,), 0
        self._key, self._ids = key, ids

    def n_workers(self, batch_size: int) -> int:
        return batch_size

    def n_tasks(self, windows: int, backward: bool) -> int:
        return windows

    def prepare(self, pool: Pool, run: Run) -> None:
        """No-op."""

    def sweep(self, step: int, windows: Sequence[int], state: State, backward: bool) -> Sweep:
        job = TuneGradients if backward else MeasureDivergence
        label = f"tuning step {step + 1}" if backward else "held-out windows"
        return _TaskSweep(
            Task(
                (job.__name__, step, number),
                job(self._key, step, self._ids[[window]]),
                label,
                state,
                outputs=int(backward),
            )
            for number, window in enumerate(windows)
        )


class _TaskSweep(TaskRound[Divergence]):
    """A sweep of one task per window."""

    @property
    def divergences(self) -> list[Divergence]:
        return [result.value for result in self.results]

    def gradients(self, part: int) -> list[Any]:
        return [result.payloads[part] for result in self.results]
