"""What several benchmarks share: a clock, a Markdown table, and a weight matrix with something in it to find."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

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


def structured_weight(m: int, n: int, seed: int, rank: int = 64) -> Tensor:
    """Float32 [m, n] of standard deviation about 0.02: low rank + m/16 kinds of similar channels + noise.

    The three have about equal energy, so that neither K-Means nor the SVD has everything or nothing to find.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
    kinds = torch.randn(max(1, m // 16), n, generator=generator)
    weight += kinds[torch.randint(len(kinds), (m,), generator=generator)]
    weight += torch.randn(m, n, generator=generator)
    return weight.mul_(0.02 / 3**0.5)
