"""`Finding`, one measured figure, and `Bench`, which measures time and memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Finding:
    """One measurement.

    Attributes:
        subject: what was measured.
        value: a figure, or a short text.
        ok: whether the claim holds; None for a figure without a claim.
    """

    subject: str
    value: float | int | str
    unit: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Bench:
    """The torch name of the device, and whether sizes are small, for a CPU in place of the GPU."""

    device: str
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], times: int = 3) -> float:
        """Minimum wall time of a call in seconds, after one call for warm-up."""
        call()
        seconds = []
        for _ in range(times):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def peak(self, call: Callable[[], Any]) -> int:
        """Peak memory in bytes that `call` allocates on the GPU; 0 on a CPU."""
        if not self.on_gpu:
            call()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before
