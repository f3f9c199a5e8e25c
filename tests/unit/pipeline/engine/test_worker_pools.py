"""Which workers a stage gets: those that are there, as long as they do and it gets no fewer of them."""

import pytest

from pipeline.engine.memory import Room, WorkerMemory
from pipeline.engine.ray_backend.cluster import WorkerResources
from pipeline.engine.ray_backend.worker_pools import LocalPools, choose_resources
from pipeline.engine.stage import Stage
from pipeline.engine.task import JobContext, JobOutput, Task
from pipeline.errors import ClusterError
from pipeline.settings.cluster import ClusterSettings

NODES: list[dict[str, float]] = [{"CPU": 4, "memory": 16}, {"CPU": 4, "memory": 16}]


def workers(memory: int, gpus: float = 0.0) -> WorkerResources:
    return WorkerResources(1, gpus, memory)


def fitting(resources: WorkerResources) -> int:
    return sum(map(resources.fitting, NODES))


def test_workers_that_are_there_stay_for_a_smaller_stage() -> None:
    assert choose_resources(workers(1), [workers(4), workers(3)], fitting) == workers(4)


def test_workers_are_as_large_as_the_largest_stage_if_no_stage_has_fewer_of_them() -> None:
    assert choose_resources(workers(1), [None, workers(4)], fitting) == workers(4)
    assert choose_resources(workers(1), [None, workers(5)], fitting) == workers(1)


def test_workers_that_are_too_small_or_too_large_are_replaced() -> None:
    assert choose_resources(workers(4), [workers(1), workers(4)], fitting) == workers(4)
    assert choose_resources(workers(1), [workers(8), workers(8)], fitting) == workers(1)


def test_workers_with_a_gpu_do_not_serve_a_stage_without() -> None:
    assert choose_resources(workers(1), [workers(4, gpus=1.0)], lambda resources: 1) == workers(1)


class Model:
    """What a job loads; `loaded` counts."""

    loaded = 0

    def __init__(self, key: str, device: str) -> None:
        Model.loaded += 1


class Load:
    """A job that needs a model."""

    def run(self, context: JobContext) -> JobOutput[None]:
        context.model(Model, "key")
        return JobOutput(None)


def test_a_model_stays_loaded_until_a_stage_that_loads_none() -> None:
    def stage(keeps_model: bool) -> int:
        before = Model.loaded
        pool = pools(1, Stage("a stage", WorkerMemory(cpu=1), keeps_model=keeps_model))
        pool.start(0, Task("a", Load()))
        done = pool.wait()
        assert done is not None
        assert done.error is None
        pool.close()
        return Model.loaded - before

    with LocalPools(ClusterSettings(local=True, gpus_per_worker=0)) as pools:
        assert [stage(keeps_model) for keeps_model in (True, True, False, True)] == [1, 0, 1, 0]


def local_pools(**settings: object) -> LocalPools:
    return LocalPools(ClusterSettings.model_validate({"local": True, "gpus_per_worker": 0, **settings}))


def test_memory_per_worker_limits_what_a_worker_may_hold() -> None:
    assert local_pools(memory_per_worker=0.5).room() == Room("cpu", 2**29)
    assert local_pools(memory_per_worker=10**6).room() == local_pools().room(), "no more than there is"


def test_a_stage_that_does_not_fit_is_refused_before_it_starts() -> None:
    with pytest.raises(ClusterError, match=r"tune: .* need 2\.0 GB of memory, but may hold 1\.1 GB"):
        local_pools(memory_per_worker=1)(1, Stage("tune", WorkerMemory(cpu=2 * 10**9)))


def test_a_later_stage_that_does_not_fit_is_refused_before_the_first_starts() -> None:
    settings = ClusterSettings(local=True, gpus_per_worker=0, memory_per_worker=1)
    pools = LocalPools(settings, [Stage("tune", WorkerMemory(cpu=2 * 10**9))])
    with pytest.raises(ClusterError, match="tune"):
        pools(1, Stage("compress", WorkerMemory(cpu=1)))
