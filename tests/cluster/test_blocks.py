"""Blocks of layers on real workers: equal losses for any number of them, each block read once, kills survived."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import ray

from pipeline.blocks.schedule import BlockSchedule
from pipeline.engine.memory import WorkerMemory
from pipeline.engine.ray_backend.worker_pools import RayPools, worker_pools
from pipeline.engine.stage import Stage
from pipeline.engine.task import Pool, TaskResult
from pipeline.errors import PayloadLost
from pipeline.evaluation import blocks_flow
from pipeline.evaluation.job import WindowLosses
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model
from pipeline.settings.cluster import ClusterSettings
from tests.support.blocks import layout_of, losses_whole
from tests.support.ray_cluster import ROOT, end, ray_cluster, raylet_of, workers_at
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

WINDOWS = np.random.default_rng(0).integers(1, 250, (24, 64))
OnResult = Callable[[TaskResult[Any]], None]
LOST_NODE = "127.0.0.3"
SHARD, BLOCK_UNITS = 4, 2  # windows of a shard; six layers are four blocks


@dataclass
class Session:
    """Workers on two nodes of a cluster that has no others, and the model that they evaluate.

    Attributes:
        nodes: the first one has two CPUs, the second one has one.
    """

    pools: RayPools
    nodes: list["subprocess.Popen[bytes]"]
    model: Path
    results: list[TaskResult[Any]] = field(default_factory=list)

    def measure(
        self, workers: int, on_result: Callable[[TaskResult[Any]], None] = lambda result: None
    ) -> tuple[float, ...]:
        """Losses of all windows; `on_result` receives each result."""
        self.results = []
        parts = [(start, WINDOWS[start : start + SHARD]) for start in range(0, len(WINDOWS), SHARD)]
        measured: dict[int, WindowLosses] = {}
        session = self

        class Watched(BlockSchedule):
            def done(self, result: TaskResult[Any]) -> None:
                session.results.append(result)
                on_result(result)
                super().done(result)

        with mock.patch.object(blocks_flow, "BlockSchedule", Watched):
            layout = layout_of(str(self.model), BLOCK_UNITS)
            pools: Any = lambda _, stage: self._pool(workers, stage)  # noqa: E731
            key = ModelKey(str(self.model), "float32", 2)
            blocks_flow.measure_in_blocks(key, layout, WorkerMemory(), parts, pools, measured.__setitem__)
        return tuple(loss for start in sorted(measured) for loss in measured[start].losses)

    def address_of(self, result: TaskResult[Any]) -> str:
        """Address of the node whose worker returned a result."""
        assert self.pools._workers is not None
        addresses: dict[str, str] = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return addresses[self.pools._workers.nodes[result.worker]]

    def _pool(self, workers: int, stage: Stage) -> Pool:
        """A pool whose workers have all started, without a model."""
        pool = self.pools(workers, replace(stage, keeps_model=False))
        while len(pool.idle()) < workers:
            pool.wait()
        return pool


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    model = make_tiny_model(tmp_path_factory.mktemp("blocks") / "model", layers=6, tied=False)
    # Small objects would travel to the driver at once and be safe there.
    with ray_cluster("--num-cpus=0", RAY_max_direct_call_object_size="100") as cluster:
        nodes = [cluster.join("127.0.0.2", cpus=2), cluster.join(LOST_NODE)]
        try:
            with mock.patch.dict(os.environ, cluster.environment), contextlib.chdir(ROOT):
                with worker_pools(ClusterSettings(address=cluster.address)) as pools:
                    assert isinstance(pools, RayPools)
                    yield Session(pools, nodes, model)
                ray.shutdown()
        finally:
            for node in nodes:
                end(node)


@pytest.fixture(scope="module")
def expected(session: Session) -> tuple[float, ...]:
    with mock.patch("tests.support.blocks.WINDOWS", WINDOWS):
        return losses_whole(ModelKey(str(session.model), "float32", 2)).losses


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_losses_are_those_of_the_whole_model_and_every_block_is_read_once(
    session: Session, expected: tuple[float, ...], workers: int
) -> None:
    assert session.measure(workers) == expected
    assert {result.worker for result in session.results} == set(range(workers))
    stored = sum(info.nbytes for info in open_model(str(session.model)).checkpoint.tensors.values())
    assert stored <= sum(result.value.bytes_read for result in session.results) <= 1.05 * stored


def test_a_worker_that_is_killed_changes_no_loss(session: Session, expected: tuple[float, ...]) -> None:
    killed: list[psutil.Process] = []

    def kill(_: TaskResult[Any]) -> None:
        if len(session.results) == 8:
            killed.append(workers_at("", session.nodes[0])[0])
            killed[0].kill()

    assert session.measure(3, kill) == expected
    assert killed


def test_a_node_that_is_lost_with_hidden_states_changes_no_loss(session: Session, expected: tuple[float, ...]) -> None:
    """The node does not come back, so that two workers end the run; this test is the last one because of that."""
    killed: list[psutil.Process] = []

    def kill(result: TaskResult[Any]) -> None:
        if not killed and result.payloads and session.address_of(result) == LOST_NODE:
            raylet = raylet_of(session.nodes[1])
            assert raylet is not None
            killed.append(raylet)
            raylet.kill()

    assert session.measure(3, kill) == expected
    assert killed
    assert any(isinstance(result.error, PayloadLost) for result in session.results)
