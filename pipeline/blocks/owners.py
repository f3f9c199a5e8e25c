"""Owners of stations: which worker serves which station of a schedule, and which block each worker holds."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.blocks.block import Block
from pipeline.blocks.presence import Presence
from pipeline.blocks.stations import Station


@dataclass(frozen=True)
class Demand:
    """Stations that need a worker.

    Attributes:
        open: stations that shards have still to pass, in order.
        ready: those of them with a shard that can pass now.
        repeated: those of them where this shard repeats what was lost.
        busy: those with a task under way.
    """

    open: Sequence[int]
    ready: Collection[int]
    repeated: Collection[int]
    busy: Collection[int]


class Owners:
    """Which worker serves which station, and which block each worker holds."""

    def __init__(self, stations: Sequence[Station], n_workers: Callable[[], int], held: Mapping[int, Block]) -> None:
        self._stations, self._n_workers = stations, n_workers
        self._n_blocks = len({station.block for station in stations})
        # Station -> the worker that serves it, and worker -> the block that it holds.
        self._owners: dict[int, int] = {}
        self._held = dict(held)
        self._presence = Presence()

    def station_of(self, worker: int, demand: Demand) -> int | None:
        """The station that an idle worker serves; it takes another one if its own is finished."""
        self._presence.asks(worker)
        own = next((station for station, owner in self._owners.items() if owner == worker), None)
        if own in demand.ready:
            return own
        self._dismiss_gone(worker, demand.busy)
        free = [station for station in demand.open if station not in demand.busy and station not in self._owners]
        # What shards repeat may be what all others wait for.
        repeated = [station for station in free if station in demand.repeated]
        if own is not None and own in demand.open:
            earlier = (station for station in self._unheld(worker, free) if station in demand.ready and station < own)
            return self._own(worker, [*repeated, *earlier, own][0])
        candidates = [*repeated, *self._preferred(worker, free, demand)]
        return self._own(worker, candidates[0]) if candidates else None

    @property
    def held(self) -> Mapping[int, Block]:
        """Worker -> the block that it holds."""
        return self._held

    def seen(self, worker: int) -> None:
        """Note that a worker has ended a task, well or not."""
        self._presence.seen(worker)

    def served(self, station: int, worker: int) -> None:
        """Note which worker served a station: a repeated task may have run elsewhere."""
        self._held[worker] = self._stations[station].block
        if self._owners.get(station, worker) != worker:
            self._own(worker, station)

    def upcoming(self, station: int, open_stations: Sequence[int]) -> Block | None:
        """The block that the owner of a station will probably load next: they finish in the order of their stations.

        None if this is not known, because not all workers have a station yet.
        """
        if self._all_resident() or self._presence.n_seen < self._n_workers():
            return None
        free = [later for later in open_stations if later not in self._owners]
        rank = sorted(self._owners).index(station)
        return None if rank >= len(free) else self._stations[free[rank]].block

    def _preferred(self, worker: int, free: Sequence[int], demand: Demand) -> Iterator[int]:
        held = self._held.get(worker)
        same_block = [station for station in free if self._stations[station].block == held]
        yield from (station for station in same_block[:1] if station in demand.ready)
        yield from (same_block if self._all_resident() else ()) or self._unheld(worker, free)

    def _unheld(self, worker: int, free: Sequence[int]) -> list[int]:
        """The free stations, unless there are enough workers for each to keep its block; then those of no other one."""
        others = {block for other, block in self._held.items() if other != worker} if self._all_resident() else set()
        return [station for station in free if self._stations[station].block not in others]

    def _own(self, worker: int, station: int) -> int:
        self._owners = {other: owner for other, owner in self._owners.items() if owner != worker}
        self._owners[station] = worker
        self._held[worker] = self._stations[station].block
        return station

    def _dismiss_gone(self, asking: int, busy: Collection[int]) -> None:
        """Forget the workers that do not take part any more, as far as the one that asks can know."""
        working = {self._owners.get(station) for station in busy}
        gone = {other for other in self._held if other not in working and self._presence.is_gone(other, asking)}
        self._owners = {station: owner for station, owner in self._owners.items() if owner not in gone}
        self._held = {other: block for other, block in self._held.items() if other not in gone}

    def _all_resident(self) -> bool:
        """Whether there are enough workers for each to keep one block."""
        return self._n_workers() >= self._n_blocks
