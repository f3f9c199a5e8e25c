"""Memory of workers: what a stage needs, what a worker may hold, and the one comparison of both."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import ClusterError

# Torch's name of the device of a worker with a GPU.
GPU = "cuda"
# What to do if a worker is too small, by whether it has a GPU.
_REMEDIES = {
    True: "raise --memory-per-worker, use larger GPUs or a larger --gpus-per-worker, or compute on CPUs by"
    " --gpus-per-worker 0",
    False: "raise --memory-per-worker, use a larger node, or try it all the same by --workers 1 without"
    " --memory-per-worker",
}


@dataclass(frozen=True)
class WorkerMemory:
    """Peak memory of a worker, for both kinds of workers: one without a GPU needs `cpu`, one with a GPU the others.

    Attributes:
        cpu: bytes of resident memory of a worker that computes on the CPU.
        host: bytes of resident memory of a worker that computes on a GPU, those of CUDA's libraries included.
        device: bytes of GPU memory of such a worker, those of CUDA's context included.
    """

    cpu: int = 0
    host: int = 0
    device: int = 0

    def limited(self, kind: str) -> int:
        """Bytes of the memory that limits a worker on a device of `kind`: that of the GPU, or else that of the host."""
        return self.device if kind == GPU else self.cpu

    def resident(self, kind: str) -> int:
        """Bytes of host memory of a worker on a device of `kind`."""
        return self.host if kind == GPU else self.cpu

    def __add__(self, other: "WorkerMemory") -> "WorkerMemory":
        return WorkerMemory(self.cpu + other.cpu, self.host + other.host, self.device + other.device)

    def __sub__(self, other: "WorkerMemory") -> "WorkerMemory":
        return WorkerMemory(self.cpu - other.cpu, self.host - other.host, self.device - other.device)


# What a process that uses a GPU holds of it and of host memory: CUDA's context and libraries.
CUDA = WorkerMemory(host=2_500_000_000, device=1_000_000_000)


def largest(memories: Iterable[WorkerMemory]) -> WorkerMemory:
    """The memory of a worker that does the work of each of `memories` in turn."""
    found = [WorkerMemory(), *memories]
    return WorkerMemory(max(m.cpu for m in found), max(m.host for m in found), max(m.device for m in found))


@dataclass(frozen=True)
class Room:
    """What one worker may hold.

    Attributes:
        kind: torch's name of the device that holds the weights: "cpu" or "cuda".
        nbytes: bytes of memory of that device.
    """

    kind: str
    nbytes: int

    def holds(self, memory: WorkerMemory) -> bool:
        """Whether a worker that needs `memory` fits."""
        return memory.limited(self.kind) <= self.nbytes


def require_room(stage: str, memory: WorkerMemory, room: Room) -> None:
    """Raise ClusterError if a worker of a stage is predicted to need more than it may hold."""
    needed, on_gpu = memory.limited(room.kind), room.kind == GPU
    if not room.holds(memory):
        raise ClusterError(
            f"{stage}: a worker is predicted to need {needed / 1e9:.1f} GB of {'GPU ' if on_gpu else ''}memory, but may"
            f" hold {room.nbytes / 1e9:.1f} GB; {_REMEDIES[on_gpu]}"
        )
