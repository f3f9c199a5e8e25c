"""Helpers of several benchmarks: a clock, a Markdown table, digests of an output, and a structured weight."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.outputs.owned_files import REPORT
from pipeline.storage.store import Store

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Result of `call`, and its wall time in seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def print_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table; floats have four significant digits."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def contents(output: Store) -> dict[str, str]:
    """sha256 of every file of an output except the report, which contains times."""
    return {name: output.sha256(name) for name in output.names() if name != REPORT}


def structured_weight(m: int, n: int, seed: int, rank: int = 256) -> Tensor:
    """Float32 weight [m, n] with standard deviation 0.02: a low-rank part, m/16 groups of similar channels, and noise.

    The singular values decay as 1/√i, and channels follow their group to different degrees, so that clusters overlap.
    With well-separated clusters, Lloyd's algorithm would converge after two iterations and the times would be too
    optimistic.
    """
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, rank + 1) ** -0.5
    weight = (torch.randn(m, rank, generator=generator) * decay) @ torch.randn(rank, n, generator=generator)
    weight /= decay.square().sum().sqrt()
    groups = torch.randn(max(1, m // 16), n, generator=generator)
    group_of = torch.randint(len(groups), (m,), generator=generator)
    weight += groups[group_of] * torch.rand(m, 1, generator=generator)
    weight += torch.randn(m, n, generator=generator)
    return weight.mul_(0.02 / weight.std())
