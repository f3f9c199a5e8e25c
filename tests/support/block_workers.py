"""Workers of a simulated cluster that run the passes of a block schedule, in any order, with losses at any point."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from weakref import WeakSet

from pipeline.blocks.block import Block
from pipeline.blocks.schedule import BlockSchedule, Pass
from pipeline.blocks.stations import Station
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.task import JobContext, JobOutput, Task, TaskResult
from pipeline.errors import NodeLost, PayloadLost, SwscError, WorkerLost


class Handle:
    """What a pass returned, in the memory of a worker's node."""

    def __init__(self, step: Pass, worker: int) -> None:
        self.step, self.worker, self.lost = step, worker, False


@dataclass(frozen=True)
class NoJob:
    """A job that no worker runs."""

    def run(self, context: JobContext) -> JobOutput[Any]:
        raise NotImplementedError


class Silent(Progress):
    """Counts tasks, and prints nothing."""

    def log(self, line: str) -> None: ...


@dataclass
class Faults:
    """What may still be lost: processes with what they hold, nodes with their payloads, and single payloads."""

    workers: int = 0
    nodes: int = 0
    payloads: int = 0


@dataclass
class SimulatedPool:
    """A pool whose every step is drawn.

    A lost worker returns after some steps, or never if another one is left.

    Attributes:
        passes: successful passes, each with its worker.
        loads: worker -> blocks that it loaded, in order.
        totals: station -> shards in the sums that were completed there.
        live: handles that somebody still refers to.
    """

    size: int
    draw: Random
    faults: Faults = field(default_factory=Faults)
    stations: Sequence[Station] = ()
    n_shards: int = 0
    busy: dict[int, Task[Any]] = field(default_factory=dict)
    away: dict[int, float] = field(default_factory=dict)
    passes: list[tuple[Pass, int]] = field(default_factory=list)
    loads: defaultdict[int, list[Block]] = field(default_factory=lambda: defaultdict(list))
    totals: dict[int, list[int]] = field(default_factory=dict)
    live: "WeakSet[Handle]" = field(default_factory=WeakSet)
    most_live: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    # Worker -> the station whose sums it has, and the shards in them.
    _sums: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def idle(self) -> list[int]:
        return [worker for worker in range(self.size) if worker not in self.busy and worker not in self.away]

    def start(self, worker: int, task: Task[Any]) -> None:
        assert worker in self.idle()
        self.busy[worker] = task
        block = self.stations[task.key.station].block
        if self.loads[worker][-1:] != [block]:
            self.loads[worker].append(block)

    def wait(self) -> TaskResult[Any] | None:
        self.most_live = max(self.most_live, len(self.live))
        self.away = {worker: steps - 1 for worker, steps in self.away.items() if steps > 0}
        if not self.busy:
            return None
        worker = sorted(self.busy)[self.draw.randrange(len(self.busy))]
        task = self.busy.pop(worker)
        error = self._fault(worker, task)
        return TaskResult(task, error=error, worker=worker) if error else self._finished(worker, task)

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None:
        self.busy.clear()

    def _fault(self, worker: int, task: Task[Any]) -> SwscError | None:
        if any(handle.lost for handle in task.payloads):
            self.lost["seen"] += 1
            return PayloadLost("gone")
        kinds = [kind for kind, left in vars(self.faults).items() if left]
        kind = kinds[self.draw.randrange(len(kinds))] if kinds and self.draw.randrange(8) == 0 else ""
        if not kind:
            return None
        setattr(self.faults, kind, getattr(self.faults, kind) - 1)
        self.lost[kind] += 1
        if kind == "payloads":
            for handle in task.payloads[:1]:
                handle.lost = True
            return PayloadLost("gone") if task.payloads else None
        return self._lose(worker, kind)

    def _lose(self, worker: int, kind: str) -> SwscError:
        """Lose the process of a worker or its node."""
        self.loads[worker].append(Block(-1, -1, -1))  # its successor holds nothing
        self._sums.pop(worker, None)
        others = set(range(self.size)) - {gone for gone, steps in self.away.items() if steps == float("inf")} - {worker}
        steps = self.draw.randrange(6)
        self.away[worker] = float("inf") if steps == 5 and others else steps
        if kind == "workers":
            return WorkerLost("gone")
        for handle in self.live:
            handle.lost |= handle.worker == worker
        return NodeLost("gone")

    def _finished(self, worker: int, task: Task[Any]) -> TaskResult[Any]:
        step: Pass = task.key
        if step.adds and not self._add(worker, step):
            return TaskResult(task, "sums lost", (self._handle(step, worker),), worker=worker)
        self.passes.append((step, worker))
        is_last = step.station == len(self.stations) - 1
        return TaskResult(task, "ok", () if is_last else (self._handle(step, worker),), worker=worker)

    def _handle(self, step: Pass, worker: int) -> Handle:
        handle = Handle(step, worker)
        self.live.add(handle)
        return handle

    def _add(self, worker: int, step: Pass) -> bool:
        """Add a shard to the sums of its station; False if those of the earlier shards are not on this worker."""
        if step.shard == 0:
            self._sums[worker] = (step.station, [])
        station, shards = self._sums.get(worker, (-1, []))
        if station != step.station or len(shards) != step.shard:
            return False
        shards.append(step.shard)
        if step.shard == self.n_shards - 1:
            self.totals[step.station] = shards
            del self._sums[worker]
        return True


def simulate(stations: Sequence[Station], n_shards: int, pool: SimulatedPool) -> BlockSchedule:
    """Let the pool run a schedule to its end. RunError if shards remain."""
    pool.stations, pool.n_shards = stations, n_shards

    def make_task(step: Pass, inputs: tuple[Any, ...]) -> Task[Any]:
        given = [handle.step for handle in inputs]
        assert [(one.station, one.shard) for one in given] == [
            (station, step.shard) for station in stations[step.station].inputs
        ]
        return Task(step, NoJob(), "", inputs)

    def on_done(step: Pass, result: TaskResult[Any]) -> None:
        if result.value == "sums lost":
            schedule.rewind(step.station)

    schedule = BlockSchedule(stations, n_shards, lambda: pool.size, make_task, on_done)
    with Silent("simulate", n_shards * len(stations), 0, unit="passes") as progress:
        execute(pool, schedule, progress)
    schedule.require_finished()
    return schedule
