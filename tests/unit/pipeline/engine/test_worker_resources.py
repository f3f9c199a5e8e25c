"""Resources that workers request of a cluster's nodes."""

import pytest

from pipeline.engine.memory import WorkerMemory
from pipeline.engine.ray_backend.cluster import WorkerResources, cpu_room, resources_of
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

GB = 1_000_000_000
NODES = [{"CPU": 4.0, "memory": 8.0 * GB}, {"CPU": 2.0, "memory": 4.0 * GB}]


def test_a_worker_requests_the_predicted_memory_unless_the_number_of_workers_is_given() -> None:
    assert resources_of(ClusterSettings(), NODES, WorkerMemory(cpu=GB)) == WorkerResources(1, 0.0, GB)
    assert resources_of(ClusterSettings(workers=2), NODES, WorkerMemory(cpu=GB)) == WorkerResources(1, 0.0)


def test_workers_never_span_two_nodes() -> None:
    assert [WorkerResources(3, 0.0).fitting(node) for node in NODES] == [1, 0]
    with pytest.raises(ClusterError, match="6 CPUs"):
        resources_of(ClusterSettings(cpus_per_worker=5), NODES, WorkerMemory())


def test_more_memory_than_the_largest_node_has_is_an_error_unless_an_autoscaler_adds_nodes() -> None:
    with pytest.raises(ClusterError, match=r"9\.0 GB .* 8\.0 GB"):
        resources_of(ClusterSettings(), NODES, WorkerMemory(cpu=9 * GB))
    settings = ClusterSettings(elastic=True, gpus_per_worker=0)
    assert resources_of(settings, NODES, WorkerMemory(cpu=9 * GB)).memory == 9 * GB


def test_a_gpu_model_without_gpus_is_an_error() -> None:
    with pytest.raises(ClusterError, match="--gpu-type A100"):
        resources_of(ClusterSettings(gpu_type="A100"), NODES, WorkerMemory())


def test_a_larger_worker_covers_a_smaller_one_on_the_same_kind_of_device_only() -> None:
    assert WorkerResources(1, 0.0, 2).covers(WorkerResources(1, 0.0, 1))
    assert not WorkerResources(1, 0.0, 1).covers(WorkerResources(1, 0.0, 2))
    assert not WorkerResources(1, 1.0, 2).covers(WorkerResources(1, 0.0, 1))


def test_a_worker_with_a_gpu_requests_host_memory_for_loading_alone() -> None:
    nodes = [{"CPU": 8.0, "GPU": 8.0, "memory": 100.0 * GB}]
    whole = WorkerMemory(cpu=200 * GB, host=10 * GB, device=70 * GB)
    assert resources_of(ClusterSettings(), nodes, whole) == WorkerResources(1, 1.0, 10 * GB)


def test_a_worker_on_a_cpu_may_hold_the_largest_node_so_that_fewer_workers_hold_whole_models() -> None:
    assert cpu_room(ClusterSettings(), NODES) == 8 * GB
    assert cpu_room(ClusterSettings(workers=4), NODES) > 10**6 * GB, "the user's number stands"
    assert cpu_room(ClusterSettings(elastic=True), NODES) > 10**6 * GB, "larger nodes may join"
