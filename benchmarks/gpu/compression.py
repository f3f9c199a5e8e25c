"""Compression of one matrix: repeatability, agreement with a CPU, kernels per block of columns, seconds, memory."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import structured_weight
from benchmarks.gpu.finding import Bench, Finding
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.planning.memory import matrix_device_bytes
from swsc_core import Encoded, Metric, SwscSpec, decode, encode
from swsc_core.layers.linear import SwscLinear
from swsc_core.method.codebook_fit import CodebookFit

# Relative difference that is allowed between the errors on a GPU and on a CPU.
_PARITY = 0.01


def hessian(n: int) -> Tensor:
    """A random Hessian [n, n]."""
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(1))
    return x.T @ x / len(x)


def encoded_weight(device: str, n: int, spec: SwscSpec) -> Encoded:
    """An n×n weight, compressed on a device."""
    metric = Metric(hessian(n).to(device), tokens=2 * n) if spec.metric == "activations" else None
    return encode(structured_weight(n, n, 0, rank=16).to(device).bfloat16(), [spec], name="w", metric=metric)


def specs(bench: Bench) -> dict[str, SwscSpec]:
    k, rank = bench.size(256, 16), bench.size(32, 4)
    best = SwscSpec(k, 0, segment_size=4, scaled=True, metric="activations", feedback=True, rounds=4, centroid_bits=8)
    return {
        "best": best,
        "best, input": replace(best, channel_axis="input"),
        "best, rank": replace(best, rank=rank, factor_bits=8),
        "paper": SwscSpec(bench.size(96, 8), rank),
    }


def twice_and_parity(bench: Bench) -> Iterator[Finding]:
    """Two runs give equal bytes, with an error close to that on a CPU."""
    n = bench.size(1024, 64)
    for name, spec in specs(bench).items():
        first, second = (encoded_weight(bench.device, n, spec) for _ in range(2))
        equal = all(torch.equal(first.tensors[part], second.tensors[part]) for part in first.tensors)
        yield Finding(f"encode twice, {name}", "equal" if equal else "different", ok=equal)
        cpu = encoded_weight("cpu", n, spec)
        ratio = first.relative_error / cpu.relative_error
        yield Finding(f"relative error over that of a CPU, {name}", ratio, "×", abs(ratio - 1) <= _PARITY)
        yield from _layer(bench, name, first)


def _layer(bench: Bench, name: str, encoded: Encoded) -> Iterator[Finding]:
    layer = SwscLinear(encoded.entry, False, torch.float32, "meta")
    parts = {part: t.float() if t.dtype == torch.bfloat16 else t for part, t in encoded.tensors.items()}
    layer.load_state_dict(parts, assign=True)
    x = torch.randn(8, encoded.entry.shape[1]).to(bench.device)
    expected = x @ decode(encoded.tensors, encoded.entry).float().T
    gap = float((layer(x) - expected).abs().max() / expected.abs().max())
    yield Finding(f"layer against the restored weight, {name}", gap, "", gap < 0.02)
    yield Finding(f"forward pass of a layer, {name}", 1e3 * bench.seconds(lambda: layer(x)), "ms")


def blocks(bench: Bench) -> Iterator[Finding]:
    """Kernels and synchronisations per block of columns. CUDA's debug mode turns a synchronisation into an error."""
    n = bench.size(2048, 64)
    spec = specs(bench)["best"]
    metric = Metric(hessian(n).to(bench.device), tokens=2 * n)
    weight = structured_weight(n, n, 0, rank=16).to(bench.device)
    fit = CodebookFit(weight, metric, spec, torch.bfloat16)
    fit.start(weight, torch.Generator().manual_seed(0))
    count = n // fit.layout.width * len(list(fit._slabs()))
    assign, reassign = partial(fit.assign, weight, feedback=True), partial(fit.reassign, weight)
    assign()
    if bench.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            assign()
            yield Finding("synchronisations in the loop over columns", 0, ok=True)
        except RuntimeError as error:
            yield Finding("synchronisations in the loop over columns", str(error).splitlines()[0], ok=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, step in (("assign", assign), ("reassign", reassign)):
        yield Finding(f"{name}, per block of columns", 1e3 * bench.seconds(step, 1) / count, "ms")
        yield from _kernels(bench, name, step, count)
    yield Finding("refit", bench.seconds(partial(fit.refit, weight), 1), "s")


def _kernels(bench: Bench, name: str, step: Any, count: int) -> Iterator[Finding]:
    if not bench.on_gpu:
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        bench.wait()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time_total for event in kernels) / 1e6
    yield Finding(f"{name}, kernels per block", len(kernels) / count, "")
    yield Finding(f"{name}, GPU time", busy, "s")


def whole_matrices(bench: Bench) -> Iterator[Finding]:
    """Seconds and memory of a matrix. The memory must not exceed the estimate."""
    for name in ("best", "paper"):
        yield from _whole_matrix(bench, name, bench.size(4096, 64))


def _whole_matrix(bench: Bench, name: str, n: int) -> Iterator[Finding]:
    spec = specs(bench)[name]
    seconds: list[float] = []
    peak = bench.peak(lambda: seconds.append(bench.seconds(lambda: encoded_weight(bench.device, n, spec), 1)))
    yield Finding(f"encode {n}×{n}, {name}", seconds[0], "s")
    if bench.on_gpu:
        share = peak / matrix_device_bytes(whole_matrix(TensorInfo("w", "BF16", (n, n), "f", 0, 2 * n * n)), spec)
        yield Finding(f"memory of {n}×{n}, {name}, over the estimate", share, "×", share <= 1)
