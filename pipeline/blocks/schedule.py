"""Schedule of blocks: shards of windows pass through stations, each of which one worker serves.

A station is one pass of one block: forward, or backward with the recomputation of the forward pass. A worker loads the
block of its station once and serves all shards there, while other workers serve the stations before and after it. It
then takes the next station that nobody serves. With as many workers as blocks, each keeps its block; with one worker,
blocks are loaded in turn. The tasks are the same in both cases, and so are their results.

Hidden states that are lost with a node are computed again: the shard repeats the stations that return them. Sums over
shards exist only on the worker of their station; if it is lost, all shards pass that station again, and no other one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.blocks.block import Block
from pipeline.blocks.owners import Demand, Owners
from pipeline.blocks.stations import Station
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import PayloadLost, RunError

# Times that hidden states of one shard may be lost for each station, and sums of one station. The loss of one node may
# concern the hidden states of all stations, which is found out one after the other.
_MAX_LOSSES = 5


@dataclass(frozen=True)
class Pass:
    """What one task does.

    Attributes:
        station: number of the station.
        shard: number of the shard.
        adds: the pass counts in the sums of the station; False if it only repeats what was lost.
        upcoming: the block that the worker will probably need next, to be read meanwhile; None if there is none.
        number: counts the tasks of the schedule, because a repeated pass has further attempts.
    """

    station: int
    shard: int
    adds: bool = False
    upcoming: Block | None = None
    number: int = 0


@dataclass
class _Shard:
    """A shard of windows.

    Attributes:
        station: number of the first station that it has never passed.
        repeated: passes to repeat first, in reverse order: number of the station, and whether the pass adds.
        running: whether a task is under way.
        payloads: station -> handle of what it returned.
        losses: times that its hidden states were lost.
    """

    station: int = 0
    repeated: list[tuple[int, bool]] = field(default_factory=list)
    running: bool = False
    payloads: dict[int, Any] = field(default_factory=dict)
    losses: int = 0

    def will_pass(self, station: int) -> bool:
        """Whether it has to pass a station now or later."""
        return self.station <= station or any(number == station for number, _ in self.repeated)


class BlockSchedule:
    """A `TaskSource` that sends shards through stations."""

    def __init__(
        self,
        stations: Sequence[Station],
        n_shards: int,
        n_workers: Callable[[], int],
        make_task: Callable[[Pass, tuple[Any, ...]], Task[Any]],
        on_done: Callable[[Pass, TaskResult[Any]], None],
        held: Mapping[int, Block] | None = None,
    ) -> None:
        """Begin with all shards at the first station.

        Args:
            stations: the passes, in the order in which every shard makes them.
            n_shards: number of shards.
            n_workers: returns the present number of workers.
            make_task: returns the task of a pass, whose key is the `Pass`, with the handles of its inputs.
            on_done: receives the result of every pass that succeeded.
            held: worker -> the block that it holds from an earlier schedule.
        """
        self._stations = stations
        self._make_task, self._on_done = make_task, on_done
        self._shards = [_Shard() for _ in range(n_shards)]
        self._owners = Owners(stations, n_workers, held or {})
        self._n_tasks = 0
        # Number of shards in the sums of each station, and times that these sums were lost.
        self._n_added = [0] * len(stations)
        self._sums_lost = [0] * len(stations)

    @property
    def held(self) -> Mapping[int, Block]:
        """Worker -> the block that it holds."""
        return self._owners.held

    def require_finished(self) -> None:
        """Raise RunError unless all shards have passed all stations."""
        if unfinished := sum(shard.will_pass(len(self._stations) - 1) for shard in self._shards):
            raise RunError(f"{unfinished} of {len(self._shards)} shards of windows did not pass all blocks")

    def next(self, worker: int) -> Task[Any] | None:
        for shard in self._shards:
            self._repeat_lost(shard)
        open_stations = [station for station in range(len(self._stations)) if self._is_open(station)]
        ready = {station: first for station in open_stations if (first := self._ready_shard(station)) is not None}
        busy = {self._next_pass(shard)[0] for shard in self._shards if shard.running}
        repeated = {station for station, number in ready.items() if self._shards[number].repeated}
        station = self._owners.station_of(worker, Demand(open_stations, ready.keys(), repeated, busy))
        if station is None or station not in ready:
            return None
        number = ready[station]
        shard = self._shards[number]
        shard.running = True
        inputs = tuple(shard.payloads[earlier] for earlier in self._stations[station].inputs)
        adds = self._next_pass(shard)[1]
        upcoming = self._owners.upcoming(station, open_stations)
        self._n_tasks += 1
        return self._make_task(Pass(station, number, adds, upcoming, self._n_tasks), inputs)

    def seen(self, worker: int) -> None:
        """Note that a worker is there, which asked for a task and got one of another kind."""
        self._owners.seen(worker)

    def done(self, result: TaskResult[Any]) -> None:
        completed: Pass = result.task.key
        shard = self._shards[completed.shard]
        shard.running = False
        self._owners.seen(result.worker)
        if isinstance(result.error, PayloadLost) and shard.losses < _MAX_LOSSES * len(self._stations):
            shard.losses += 1
            for number in self._stations[completed.station].inputs:
                shard.payloads.pop(number, None)  # which one was lost is not known
            return
        if result.error:
            raise result.error
        self._owners.served(completed.station, result.worker)
        self._go_on(shard, completed)
        if result.payloads:
            shard.payloads[completed.station] = result.payloads[0]
        self._on_done(completed, result)
        for each in self._shards if not self._is_open(completed.station) else [shard]:
            self._forget(each)

    def drop(self, number: int) -> None:
        """End a shard, which passes no further station. Only for stations without sums."""
        self._shards[number] = _Shard(len(self._stations))

    def rewind(self, station: int) -> None:
        """Let all shards pass a station again, because the worker that added them up was lost.

        Raises:
            RunError: this happens again and again.
        """
        self._sums_lost[station] += 1
        if self._sums_lost[station] > _MAX_LOSSES:
            raise RunError(f"{self._stations[station].block}: the sums were lost {_MAX_LOSSES} times")
        self._n_added[station] = 0
        for shard in self._shards:
            if shard.station > station and (station, True) not in shard.repeated:
                shard.repeated.append((station, True))

    def _next_pass(self, shard: _Shard) -> tuple[int, bool]:
        """Station that a shard passes next, and whether it adds there."""
        if shard.repeated:
            return shard.repeated[-1]
        return shard.station, shard.station < len(self._stations) and self._stations[shard.station].adds

    def _go_on(self, shard: _Shard, completed: Pass) -> None:
        if (completed.station, completed.adds) in shard.repeated:
            shard.repeated.remove((completed.station, completed.adds))
        else:
            shard.station = max(shard.station, completed.station + 1)
        self._n_added[completed.station] += completed.adds

    def _is_open(self, station: int) -> bool:
        return any(shard.will_pass(station) for shard in self._shards)

    def _ready_shard(self, station: int) -> int | None:
        """The first shard that can pass a station now."""
        for number, shard in enumerate(self._shards):
            if shard.running:
                continue
            passed, adds = self._next_pass(shard)
            if passed == station and (not adds or number == self._n_added[station]):
                return number
        return None

    def _repeat_lost(self, shard: _Shard) -> None:
        """Repeat the stations whose payloads the next pass of a shard needs and which are unknown."""
        station = self._next_pass(shard)[0]
        if shard.running or station == len(self._stations):
            return
        lost = [number for number in self._stations[station].inputs if number not in shard.payloads]
        if lost:
            shard.repeated.append((lost[0], False))
            self._repeat_lost(shard)

    def _forget(self, shard: _Shard) -> None:
        """Release what no station needs that is open, nor the last pass, which may have to be repeated."""
        needed: set[int] = set()
        ends = shard.station == len(self._stations) and not self._stations[-1].adds
        for number, station in enumerate(self._stations):
            if number >= shard.station - 1 + ends or (station.adds and self._is_open(number)):
                needed |= {*station.inputs}
        for number, _ in shard.repeated:
            needed |= {*self._stations[number].inputs}
        shard.payloads = {number: handle for number, handle in shard.payloads.items() if number in needed}
