"""Shards of windows pass all stations, whatever is lost, and blocks are loaded no more often than needed."""

from collections import defaultdict
from itertools import groupby
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.blocks.stations import Station, backward_stations, forward_stations
from pipeline.errors import PayloadLost
from tests.support.block_workers import Faults, SimulatedPool, simulate
from tests.support.blocks import blocks_of

SHARDS, BLOCKS, WORKERS = st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)
KINDS = st.sampled_from([forward_stations, backward_stations])
DRAWS = st.builds(Random, st.integers(0, 1 << 32))
FAULTS = st.builds(Faults, st.integers(0, 1), st.integers(0, 2), st.integers(0, 2))


class LateLoss(Random):
    """Draws a loss after a number of passes."""

    def __init__(self, passes: int) -> None:
        super().__init__(0)
        self._left = passes

    def randrange(self, stop: int, *_: object) -> int:  # type: ignore[override]
        self._left -= stop == 8
        return int(self._left > 0) if stop == 8 else 0


@given(KINDS, BLOCKS, SHARDS, WORKERS, FAULTS, DRAWS)
def test_every_shard_passes_every_station_in_order_whatever_is_lost(
    kind: object, n_blocks: int, n_shards: int, workers: int, faults: Faults, draw: Random
) -> None:
    stations = kind(blocks_of(n_blocks, 1))  # type: ignore[operator]
    pool = SimulatedPool(workers, draw, faults)
    simulate(stations, n_shards, pool)
    for shard in range(n_shards):
        passed = [step.station for step, _ in pool.passes if step.shard == shard]
        assert list(dict.fromkeys(passed)) == list(range(len(stations)))
    adding = [number for number, station in enumerate(stations) if station.adds]
    assert pool.totals == {number: list(range(n_shards)) for number in adding}


@given(KINDS, BLOCKS, SHARDS, WORKERS, DRAWS)
def test_one_worker_serves_a_station_and_each_pass_is_made_once_if_nothing_is_lost(
    kind: object, n_blocks: int, n_shards: int, workers: int, draw: Random
) -> None:
    stations: tuple[Station, ...] = kind(blocks_of(n_blocks, 1))  # type: ignore[operator]
    pool = SimulatedPool(workers, draw)
    simulate(stations, n_shards, pool)
    assert len(pool.passes) == n_shards * len(stations)
    servers: defaultdict[int, set[int]] = defaultdict(set)
    for step, worker in pool.passes:
        servers[step.station].add(worker)
    assert all(len(workers) == 1 for workers in servers.values())


@given(KINDS, BLOCKS, SHARDS, st.integers(0, 2), DRAWS)
def test_with_as_many_workers_as_blocks_each_block_is_loaded_once_by_one_worker(
    kind: object, n_blocks: int, n_shards: int, more: int, draw: Random
) -> None:
    stations = kind(blocks_of(n_blocks, 1))  # type: ignore[operator]
    pool = SimulatedPool(n_blocks + more, draw)
    simulate(stations, n_shards, pool)
    loaded = [block for blocks in pool.loads.values() for block in blocks]
    assert sorted(loaded, key=lambda block: block.start) == list(blocks_of(n_blocks, 1))


@given(KINDS, BLOCKS, SHARDS, WORKERS, DRAWS)
def test_a_block_is_loaded_once_in_each_direction_by_any_number_of_workers(
    kind: object, n_blocks: int, n_shards: int, workers: int, draw: Random
) -> None:
    stations: tuple[Station, ...] = kind(blocks_of(n_blocks, 1))  # type: ignore[operator]
    pool = SimulatedPool(workers, draw)
    simulate(stations, n_shards, pool)
    directions = [block for block, _ in groupby(station.block for station in stations)]
    assert sum(map(len, pool.loads.values())) <= len(directions)
    assert workers > 1 or pool.loads[0] == directions


@given(BLOCKS, SHARDS, WORKERS, FAULTS, DRAWS)
def test_a_shard_keeps_the_inputs_of_its_next_and_its_last_pass_only(
    n_blocks: int, n_shards: int, workers: int, faults: Faults, draw: Random
) -> None:
    pool = SimulatedPool(workers, draw, faults)
    schedule = simulate(forward_stations(blocks_of(n_blocks, 1)), n_shards, pool)
    assert pool.most_live <= 2 * n_shards + workers
    assert schedule
    assert not pool.live


@pytest.mark.parametrize("kind", [forward_stations, backward_stations])
def test_the_loss_of_the_only_node_of_a_deep_model_is_survived(kind: object) -> None:
    """All hidden states of a shard are lost at once, and are found out one after the other."""
    stations = kind(blocks_of(20, 1))  # type: ignore[operator]
    pool = SimulatedPool(1, LateLoss(2 * len(stations) - 4))
    pool.faults = Faults(nodes=1)
    simulate(stations, 2, pool)
    assert pool.lost["nodes"] == 1
    assert {step.shard for step, _ in pool.passes if step.station == len(stations) - 1} == {0, 1}


def test_payloads_that_are_lost_forever_end_the_run() -> None:
    pool = SimulatedPool(1, LateLoss(0), Faults(payloads=10**6))
    with pytest.raises(PayloadLost):
        simulate(forward_stations(blocks_of(3, 1)), 2, pool)
