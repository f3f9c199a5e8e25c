"""The steps of one tuning.

The divergence on the held-out windows is measured first and last. In each step, the gradient of every window of its
batch is computed, and then the gradients are added in order and the values are moved. The state passes from step to
step through the object store; every few steps it is written to a file from which an interrupted tuning resumes.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

from pipeline.checkpoints.tensor_io import FINISHED_FOLDER
from pipeline.engine.scheduler import TaskRound
from pipeline.engine.task import Destination, Pool, Task
from pipeline.outputs.transaction import Output
from pipeline.tuning.job import Divergence, KeepState, ReadState, TuneStep
from pipeline.tuning.passes import Passes, Run, State, Sweep
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
    """The steps of a tuning that writes its states to `output`.

    Attributes:
        kept_step: last step whose state is in a file; 0 if there is none.
    """

    def __init__(self, key: TuneKey, passes: Passes, windows: TuningWindows, output: Output) -> None:
        self._key, self._passes, self._windows = key, passes, windows
        self._batches = windows.batches()
        self._store, self._ticket = output.store, output.ticket
        self.kept_step = max((step for step in self._kept_steps if state_file(step) in output.finished), default=0)

    @property
    def batch_size(self) -> int:
        """Windows of one step."""
        return len(self._batches[0])

    @property
    def n_tasks(self) -> int:
        """Number of tasks of a run that resumes from the kept state."""
        following = range(self.kept_step + 1, len(self._batches) + 1)
        n_parts, n_held_out = len(self._passes.parts), len(self._windows.held_out)
        kept = sum(step in self._kept_steps for step in following)
        sweeps = self._passes.n_tasks(len(following) * self.batch_size, backward=True)
        measurements = 2 * self._passes.n_tasks(n_held_out, backward=False)
        steps = n_parts * (len(following) + (self.kept_step > 0))
        return self._passes.n_preparing + sweeps + measurements + steps + kept

    def run(self, pool: Pool, run: Run) -> TuningReport:
        """Tune from the kept state on. `run` executes tasks on `pool`."""
        self._passes.prepare(pool, run)
        before = self._measured(0, (), run)
        step = self.kept_step
        state = self._read(step, run) if step else ()
        course: list[tuple[int, float]] = []
        for batch in self._batches[step:]:
            sweep = self._passes.sweep(step, batch, state, backward=True)
            run(sweep)
            step += 1
            course.append((step, mean_divergence(sweep.divergences)))
            state = self._stepped(step, self._rate(step, before), state, sweep, run)
            if step in self._kept_steps:
                self._keep(step, state, run)
        after = self._measured(step, state, run)
        return {
            "steps": step,
            "tokens": step * self.batch_size * self._windows.ids.shape[1],
            "divergence_before": before,
            "divergence_after": after,
            "applied": after < before,
            "divergence_by_step": course,
        }

    @property
    def _kept_steps(self) -> list[int]:
        return _kept_steps(len(self._batches))

    def _measured(self, step: int, state: State, run: Run) -> float:
        """Mean divergence on the held-out windows."""
        sweep = self._passes.sweep(step, self._windows.held_out, state, backward=False)
        run(sweep)
        return mean_divergence(sweep.divergences)

    def _read(self, step: int, run: Run) -> State:
        jobs = [ReadState(self._store, state_file(step), names) for names in self._passes.parts]
        return _payloads([Task(("read", part), job, "state", outputs=1) for part, job in enumerate(jobs)], run)

    def _stepped(self, step: int, rate: float, state: State, sweep: Sweep, run: Run) -> State:
        """The state after step number `step`, from the one before."""
        tasks = []
        for part, names in enumerate(self._passes.parts):
            inputs = (*state[part : part + 1], *sweep.gradients(part))
            job = TuneStep(self._key, step, rate, names)
            tasks.append(Task(("step", step, part), job, f"tuning step {step}", inputs, outputs=1))
        return _payloads(tasks, run)

    def _keep(self, step: int, state: State, run: Run) -> None:
        """Write a state to its file, and remove the files of earlier ones."""
        destination = Destination(self._ticket, state_file(step))
        run(TaskRound([Task(("keep", step), KeepState(), f"state {step}", state, outputs=1, commit_to=destination)]))
        self.kept_step = step
        for file in map(state_file, range(step)):
            self._store.remove(f"{FINISHED_FOLDER}/{file}.json")
            self._store.remove(file)

    def _rate(self, step: int, divergence: float) -> float:
        """Linear warm-up, then cosine decay; proportional to the initial `divergence` up to `_FULL_RATE_DIVERGENCE`."""
        total = len(self._batches)
        longest = _RATE * min(1.0, divergence / _FULL_RATE_DIVERGENCE)
        return longest * min(1.0, step / (1 + _WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))


def _payloads(tasks: Sequence[Task[None]], run: Run) -> State:
    """The first payload of each task."""
    done = TaskRound(tasks)
    run(done)
    return tuple(result.payloads[0] for result in done.results)


def state_file(step: int) -> str:
    """File of the state after `step` steps."""
    return f"state-{step:05d}.safetensors"


def state_files(n_steps: int) -> list[str]:
    """Files of all states that a tuning of `n_steps` steps writes."""
    return list(map(state_file, _kept_steps(n_steps)))


def mean_divergence(values: list[Divergence]) -> float:
    """Mean over all tokens, in nats per token."""
    return math.fsum(value.divergence for value in values) / sum(value.tokens for value in values)


def _kept_steps(n_steps: int) -> list[int]:
    """Steps, from 0 on, whose states are written: every `_STATE_INTERVAL`-th, and the last."""
    return [step for step in range(n_steps + 1) if step % _STATE_INTERVAL == 0 or step == n_steps]
