"""The steps of one tuning as rounds of tasks.

The first round measures the divergence on the held-out windows. Each step then has a round that computes the gradient
of every window of its batch, and a round that adds the gradients in order and moves the values. The last round measures
the divergence again. The state passes from step to step through the object store; every few steps it is written to a
file from which an interrupted tuning resumes.
"""

import math
from typing import Any, TypedDict

from pipeline.checkpoints.tensor_io import FINISHED_FOLDER
from pipeline.engine.scheduler import Rounds
from pipeline.engine.task import Destination, Task, TaskResult
from pipeline.outputs.transaction import Output
from pipeline.tuning.job import Divergence, KeepState, MeasureDivergence, ReadState, TuneGradients, TuneStep
from pipeline.tuning.tuner import TuneKey
from pipeline.tuning.windows import TuningWindows

# Longest step of a model that is `_FULL_RATE_DIVERGENCE` from the original, in units of a value's size
# (swsc_core/finetune.py).
_RATE = 8e-3
# Divergence in nats per token. A model closer to the original takes shorter steps, which would otherwise overshoot.
_FULL_RATE_DIVERGENCE = 0.5
# Share of the steps in which the rate rises.
_WARM_UP = 0.1
# Steps after which the state is written.
_STATE_INTERVAL = 8


class TuningReport(TypedDict):
    """Result of a tuning, as it is cached and as the report of a compression holds it.

    Divergences are in nats per token, on the held-out windows; `divergence_by_step` has (step, divergence on its batch)
    of the steps of the run that finished the tuning.
    """

    steps: int
    tokens: int
    divergence_before: float
    divergence_after: float
    applied: bool
    divergence_by_step: list[tuple[int, float]]


class TuningSteps:
    """The rounds of tasks of a tuning that writes its states to `output`.

    Attributes:
        kept_step: last step whose state is in a file; 0 if there is none.
        report: set when the last round has finished.
    """

    def __init__(self, key: TuneKey, windows: TuningWindows, output: Output) -> None:
        self._key, self._batches, self._held_out = key, windows.batches(), windows.held_out
        self._store, self._ticket = output.store, output.ticket
        self.kept_step = max(
            (step for step in _kept_steps(len(self._batches)) if state_file(step) in output.finished), default=0
        )
        self.report: TuningReport | None = None

    @property
    def batch_size(self) -> int:
        """Windows of one step, whose gradients can be computed in parallel."""
        return len(self._batches[0])

    def n_tasks_after(self, step: int) -> int:
        """Number of tasks of a run that resumes from the state after `step` steps."""
        following = range(step + 1, len(self._batches) + 1)
        kept = _kept_steps(len(self._batches))
        tasks = sum(len(self._batches[later - 1]) + 1 + (later in kept) for later in following)
        return tasks + 2 * len(self._held_out) + (step > 0)

    def rounds_after(self, step: int) -> Rounds:
        """Rounds of tasks of a run that resumes from the state after `step` steps. Sets `report` at the end."""
        before = mean_divergence((yield self._measurements(0, ())))
        state: tuple[Any, ...] = ()
        course: list[tuple[int, float]] = []
        if step:
            read = yield [Task("read", ReadState(self._store, state_file(step)), "state", outputs=1)]
            state = read[0].payloads
        kept = _kept_steps(len(self._batches))
        while step < len(self._batches):
            gradients = yield self._gradients(step, state)
            step += 1
            course.append((step, mean_divergence(gradients)))
            stepped = yield [self._step(step, self._rate(step, before), state, gradients)]
            state = stepped[0].payloads
            if step in kept:
                yield [self._keep(step, state)]
                self.kept_step = step
                self._remove_states_before(step)
        after = mean_divergence((yield self._measurements(step, state)))
        self.report = {
            "steps": step,
            "tokens": sum(batch.size for batch in self._batches),
            "divergence_before": before,
            "divergence_after": after,
            "applied": after < before,
            "divergence_by_step": course,
        }

    def _gradients(self, step: int, state: tuple[Any, ...]) -> list[Task[Divergence]]:
        """Tasks that compute the gradients of step number `step` + 1 from the state after `step` steps."""
        return [
            Task(
                ("gradient", step, index),
                TuneGradients(self._key, step, window[None]),
                f"tuning step {step + 1}",
                state,
                outputs=1,
            )
            for index, window in enumerate(self._batches[step])
        ]

    def _step(
        self, step: int, rate: float, state: tuple[Any, ...], gradients: list[TaskResult[Divergence]]
    ) -> Task[None]:
        inputs = (*state, *(result.payloads[0] for result in gradients))
        return Task(("step", step), TuneStep(self._key, step, rate), f"tuning step {step}", inputs, outputs=1)

    def _keep(self, step: int, state: tuple[Any, ...]) -> Task[None]:
        destination = Destination(self._ticket, state_file(step))
        return Task(("keep", step), KeepState(), f"state {step}", state, outputs=1, commit_to=destination)

    def _measurements(self, step: int, state: tuple[Any, ...]) -> list[Task[Divergence]]:
        return [
            Task(
                ("held out", step, index),
                MeasureDivergence(self._key, step, window[None]),
                f"held-out window {index}",
                state,
            )
            for index, window in enumerate(self._held_out)
        ]

    def _remove_states_before(self, step: int) -> None:
        for file in map(state_file, range(step)):
            self._store.remove(f"{FINISHED_FOLDER}/{file}.json")
            self._store.remove(file)

    def _rate(self, step: int, divergence: float) -> float:
        """Linear warm-up, then cosine decay; proportional to the initial `divergence` up to `_FULL_RATE_DIVERGENCE`."""
        total = len(self._batches)
        longest = _RATE * min(1.0, divergence / _FULL_RATE_DIVERGENCE)
        return longest * min(1.0, step / (1 + _WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))


def state_file(step: int) -> str:
    """File of the state after `step` steps."""
    return f"state-{step:05d}.safetensors"


def state_files(n_steps: int) -> list[str]:
    """Files of all states that a tuning of `n_steps` steps writes."""
    return list(map(state_file, _kept_steps(n_steps)))


def mean_divergence(results: list[TaskResult[Divergence]]) -> float:
    """Mean over all tokens of the tasks, in nats per token."""
    values = [result.value for result in results]
    return math.fsum(value.divergence for value in values) / sum(value.tokens for value in values)


def _kept_steps(n_steps: int) -> list[int]:
    """Steps, from 0 on, whose states are written: every `_STATE_INTERVAL`-th, and the last."""
    return [step for step in range(n_steps + 1) if step % _STATE_INTERVAL == 0 or step == n_steps]
