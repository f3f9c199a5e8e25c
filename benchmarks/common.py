"""What several benchmarks share: a clock, a Markdown table, and a weight matrix with something in it to find."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.outputs.owned_files import REPORT
from pipeline.storage.store import Store

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and its wall seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def print_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table on standard output; floats are given in four figures."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def contents(output: Store) -> dict[str, str]:
    """Hash of every file of an output but the report, which holds times."""
    return {name: output.sha256(name) for name in output.names() if name != REPORT}


def structured_weight(m: int, n: int, seed: int, rank: int = 256) -> Tensor:
    """Float32 [m, n] of standard deviation 0.02: low rank + m/16 kinds of similar channels + noise.

    The low rank decays as 1/√i, and a channel follows its kind more or less: clusters blur into each other. Were they
    clear cut, Lloyd would be at rest after two iterations and the clock would flatter us.
    """
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, rank + 1) ** -0.5
    weight = (torch.randn(m, rank, generator=generator) * decay) @ torch.randn(rank, n, generator=generator)
    weight /= decay.square().sum().sqrt()
    kinds = torch.randn(max(1, m // 16), n, generator=generator)
    own = torch.randint(len(kinds), (m,), generator=generator)
    weight += kinds[own] * torch.rand(m, 1, generator=generator)
    weight += torch.randn(m, n, generator=generator)
    return weight.mul_(0.02 / weight.std())
