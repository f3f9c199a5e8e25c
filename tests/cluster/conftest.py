"""A cluster of two nodes for the tests of one file: commands of the others would join it."""

from collections.abc import Iterator

import pytest

from tests.support.ray_cluster import Cluster, ray_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Head with two CPUs, second node with one."""
    with ray_cluster(dashboard=True) as running, running.another_node("127.0.0.2"):
        yield running
