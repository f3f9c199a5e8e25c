"""Which workers of a pool are still there.

The loop of the engine asks every idle worker for a task in each of its rounds. A worker that neither runs a task nor
asks for one is gone: its node was lost, and Ray has not found a place for its successor.
"""

from collections import defaultdict, deque

from pipeline.engine.scheduler import IDLE_ROUNDS


class Presence:
    """Signs of life of workers: their questions for a task, and the tasks that they have finished."""

    def __init__(self) -> None:
        self._count = 0
        # Worker -> number of its last sign of life, and those of its last questions.
        self._signs: dict[int, int] = {}
        self._questions: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=IDLE_ROUNDS))

    def seen(self, worker: int) -> None:
        """Note that a worker has finished a task."""
        self._count += 1
        self._signs[worker] = self._count

    def asks(self, worker: int) -> None:
        """Note that a worker asks for a task."""
        self.seen(worker)
        self._questions[worker].append(self._count)

    @property
    def n_seen(self) -> int:
        """Number of workers that have been there."""
        return len(self._signs)

    def is_gone(self, worker: int, asking: int) -> bool:
        """Whether a worker without a task gave no sign of life during the last questions of the one that asks now."""
        questions = self._questions[asking]
        return len(questions) == IDLE_ROUNDS and self._signs.get(worker, 0) < questions[0]
