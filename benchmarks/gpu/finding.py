"""One line of the result, and the setting that it was found in."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        value: a figure, or words.
        ok: whether a claim holds; None: a figure without a claim.
    """

    what: str
    value: float | int | str
    unit: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Bench:
    """Where to measure: torch's name of the device, and whether sizes are to be small (a CPU takes the place of the GPU)."""

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
        """Least wall seconds of a call that has run before."""
        call()
        found = []
        for _ in range(times):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - started)
        return min(found)

    def peak(self, call: Callable[[], Any]) -> int:
        """Most bytes of the GPU that lay allocated while `call` ran; 0 on a CPU."""
        if not self.on_gpu:
            call()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before
