"""Tuning: the stored values of a compressed model are moved until its predictions are closest to the original's.

Layers were compressed one by one, each as if all others were whole; here they are looked at together. Labels stand, and
with them the size of every stored byte. A step takes a few windows of the calibration text: a task finds the gradient of
each, another adds them up in their order and steps. What goes from step to step lies in the object store and, now and
then, in a file from which an interrupted tuning goes on. Some windows are held out: a tuning that does not help on them
is not applied.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.console import log
from pipeline.device import Arithmetic
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Rounds, TaskRounds, execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.engine.task import Destination, Task, TaskResult
from pipeline.errors import ConfigError, OutputError, PayloadLost
from pipeline.outputs.transaction import Output, begin
from pipeline.planning.cost_model import tuning_bytes, tuning_device_bytes
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage import records
from pipeline.storage.cache_key import cache_name, digest_of, versioned, windows_identity
from pipeline.storage.records import read_cached, read_record, report_damaged_cache
from pipeline.storage.shared_lease import remove_if_unleased
from pipeline.storage.store import Store
from pipeline.tuning.job import Divergence, KeepState, MeasureDivergence, ReadState, TuneGradients, TuneStep
from pipeline.tuning.tuner import TunedValues, TuneKey

_STEP_TOKENS = 2048  # of the windows of one step
_HELD_OUT = 8  # one window of so many
_RATE = (
    8e-3  # longest step of a model that is _FAR from the original, in units of a value's size (swsc_core/finetune.py)
)
_FAR = 0.5  # nats a token; a closer one takes shorter steps, or they would add more than there is to mend
_WARM_UP = 0.1  # share of the steps in which the rate rises
_KEPT_EVERY = 8  # steps after which the state is written
_STARTS = 3  # of a tuning whose state was lost with a node
_RESULT = "result.json"


@dataclass(frozen=True)
class TuningWindows:
    """What is tuned on: int64 windows [count, length], how many times each, and in which order."""

    ids: np.ndarray
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.ids) < 2:
            raise ConfigError("tune wants two calibration windows at the least, one to tune on and one held out")

    @property
    def held_out(self) -> np.ndarray:
        return self.ids[-max(1, len(self.ids) // _HELD_OUT) :]

    def batches(self) -> list[np.ndarray]:
        """The windows of each step."""
        some = self.ids[: len(self.ids) - len(self.held_out)]
        size = min(len(some), max(1, _STEP_TOKENS // self.ids.shape[1]))
        generator = np.random.default_rng(self.seed)
        order = np.concatenate([generator.permutation(len(some)) for _ in range(self.epochs)])
        return [some[order[start : start + size]] for start in range(0, len(order) - size + 1, size)]


class Tuning:
    """One tuning of one compressed model; what it finds is kept in `cache` for every later run of the same."""

    def __init__(
        self, source: Checkpoint, compressed: str, text: TuningWindows, settings: CalibrationSettings, cache: str,
        arithmetic: Arithmetic,
    ) -> None:  # fmt: skip
        self._source, self._text = source, text
        dtype = settings.calibration_dtype
        self._key = TuneKey(source.store.root, compressed, dtype, settings.trust_remote_code, digests_of_source(source))
        self._batches = text.batches()
        self.identity = versioned("tuned", {
            "source": source.fingerprint, "compressed": _digest_of(compressed), "epochs": text.epochs, "seed": text.seed,
            "dtype": dtype, **windows_identity(text.ids), **arithmetic.gpu_identity,
        })  # fmt: skip
        self.store = Store.at(f"{cache}/{cache_name('tuned', self.identity)}")

    def run(self, pools: Pools) -> tuple[TunedValues, dict[str, Any]]:
        """Tune, go on with a tuning that was cut short, or find a finished one again.

        Returns what came of it, and the divergence on the held-out windows before and after, in nats a token; it is
        applied if that fell.

        Raises:
            RunError: a task failed; states that were written are kept.
        """
        if not self.store.exists(_RESULT):
            with report_damaged_cache(self.store):
                begun = begin(self.store, self.identity, on_wait=log_and_release(pools), names=self._states())
            with begun as out:
                if not self.store.exists(_RESULT):  # the run that we waited for has made it
                    self._move(out, pools)
        about = read_cached(self.store, _RESULT, lambda: read_record(self.store, _RESULT, records.TuningRecord))
        return TunedValues(
            self._key.compressed, self.store, self._whole(about["steps"]) if about["applied"] else None
        ), about

    def _whole(self, steps: int) -> str:
        """File of the state after `steps` steps; OutputError if its bytes are not those that were written."""
        file = _state_file(steps)
        record = f"{FINISHED_FOLDER}/{file}.json"
        known = read_cached(self.store, record, lambda: read_record(self.store, record, records.FinishedFileRecord))
        if found := file_differences(self.store, file, known):
            raise OutputError(f"{self.store.root}: {found[0]}; remove this folder, and run the same command again")
        return file

    def _states(self) -> list[str]:
        return [_state_file(step) for step in range(len(self._batches) + 1) if self._is_kept(step)]

    def forget(self) -> None:
        """Remove what was found: whoever needs it again has to tune again."""
        remove_if_unleased(self.store)

    def _move(self, out: Output, pools: Pools) -> None:
        """Go on from the last state that was written; again, if the present one is lost with its node."""
        self._ticket = out.ticket
        self._kept = max(
            (step for step in range(len(self._batches) + 1) if _state_file(step) in out.finished), default=0
        )
        for _ in range(_STARTS - 1):
            try:
                return self._go_on(self._kept, pools)
            except PayloadLost as error:
                log(f"tune: {error}; going on from step {self._kept}")
        return self._go_on(self._kept, pools)

    def _go_on(self, done: int, pools: Pools) -> None:
        length = self._text.ids.shape[1]
        on_gpu = tuning_device_bytes(self._source, length, self._key.dtype)
        stage = Stage("tune", tuning_bytes(self._source, length), on_gpu)
        pool = pools(len(self._batches[0]), stage)
        try:
            with Progress(stage.name, self._tasks_after(done), 0, stage.unit) as progress:
                execute(pool, TaskRounds(self._stages(done)), progress)
        finally:
            pool.close()

    def _tasks_after(self, done: int) -> int:
        steps = range(done + 1, len(self._batches) + 1)
        moves = sum(len(self._batches[step - 1]) + 1 + self._is_kept(step) for step in steps)
        return moves + 2 * len(self._text.held_out) + (done > 0)

    def _is_kept(self, step: int) -> bool:
        return step % _KEPT_EVERY == 0 or step == len(self._batches)

    def _stages(self, step: int) -> Rounds:
        before = yield self._measurements(0, ())
        state: tuple[Any, ...] = ()
        course: list[tuple[int, float]] = []  # of this run: a resumed one has no memory of earlier steps
        if step:
            read = yield [Task("read", ReadState(self.store, _state_file(step)), "state", outputs=1)]
            state = read[0].payloads
        while step < len(self._batches):
            gradients = yield self._gradients(step, state)
            step += 1
            course.append((step, _mean(gradients)))
            handles = tuple(done.payloads[0] for done in gradients)
            stepped = yield [
                Task(
                    ("step", step), TuneStep(self._key, step, self._rate(step, _mean(before))), f"tuning step {step}",
                    (*state, *handles), outputs=1,
                )
            ]  # fmt: skip
            state = stepped[0].payloads
            if self._is_kept(step):
                where = Destination(self._ticket, _state_file(step))
                yield [Task(("keep", step), KeepState(), f"state {step}", state, outputs=1, commit_to=where)]
                self._kept = step
                self._forget_before(step)
        after = yield self._measurements(step, state)
        about: dict[str, Any] = {"steps": step, "tokens": sum(batch.size for batch in self._batches)}
        about |= {"divergence_before": _mean(before), "divergence_after": _mean(after)}
        about |= {"applied": _mean(after) < _mean(before), "divergence_by_step": course}
        self.store.write_json(_RESULT, about)

    def _forget_before(self, step: int) -> None:
        for name in [_state_file(earlier) for earlier in range(step)]:
            self.store.remove(f"{FINISHED_FOLDER}/{name}.json")
            self.store.remove(name)

    def _gradients(self, step: int, state: tuple[Any, ...]) -> list[Task[Divergence]]:
        return [
            Task(
                ("gradient", step, place), TuneGradients(self._key, step, window[None]), f"tuning step {step + 1}", state,
                outputs=1,
            )
            for place, window in enumerate(self._batches[step])
        ]  # fmt: skip

    def _measurements(self, step: int, state: tuple[Any, ...]) -> list[Task[Divergence]]:
        return [
            Task(
                ("held out", step, place), MeasureDivergence(self._key, step, window[None]), f"held-out window {place}", state
            )
            for place, window in enumerate(self._text.held_out)
        ]  # fmt: skip

    def _rate(self, step: int, divergence: float) -> float:
        """Rises, then falls as a cosine does; in proportion to the `divergence` at the start, up to _FAR."""
        total = len(self._batches)
        longest = _RATE * min(1.0, divergence / _FAR)
        return longest * min(1.0, step / (1 + _WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))


def _digest_of(location: str) -> str:
    """Hash of what a finished output's manifest says of its files."""
    store = Store.at(location)
    files = read_cached(store, MANIFEST, lambda: read_record(store, MANIFEST, records.ManifestRecord))["files"]
    return digest_of({name: about["sha256"] for name, about in files.items()})


def _mean(results: list[TaskResult[Divergence]]) -> float:
    values = [result.value for result in results]
    return math.fsum(value.divergence for value in values) / sum(value.tokens for value in values)


def _state_file(step: int) -> str:
    return f"state-{step:05d}.safetensors"
