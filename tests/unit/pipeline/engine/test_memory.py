"""What a worker may hold, and what stages need."""

import pytest

from pipeline.engine.memory import Room, WorkerMemory, largest, require_room
from pipeline.errors import ClusterError

GB = 10**9
MEMORY = WorkerMemory(cpu=4 * GB, host=1 * GB, device=3 * GB)


def test_a_gpu_limits_its_worker_by_device_memory_and_a_cpu_by_resident_memory() -> None:
    assert Room("cuda", 3 * GB).holds(MEMORY)
    assert not Room("cpu", 3 * GB).holds(MEMORY)
    assert (MEMORY.resident("cuda"), MEMORY.resident("cpu")) == (1 * GB, 4 * GB)


def test_the_largest_memory_is_taken_kind_by_kind() -> None:
    assert largest([MEMORY, WorkerMemory(host=2 * GB)]) == WorkerMemory(4 * GB, 2 * GB, 3 * GB)
    assert largest([]) == WorkerMemory()


@pytest.mark.parametrize(("kind", "needed"), [("cuda", "3.0 GB of GPU memory"), ("cpu", "4.0 GB of memory")])
def test_a_worker_that_is_too_small_is_refused_with_the_need_and_the_remedy(kind: str, needed: str) -> None:
    with pytest.raises(ClusterError, match=f"calibrate: .*{needed}.* hold 2.0 GB; raise --memory-per-worker"):
        require_room("calibrate", MEMORY, Room(kind, 2 * GB))
    require_room("calibrate", MEMORY, Room(kind, 4 * GB))
