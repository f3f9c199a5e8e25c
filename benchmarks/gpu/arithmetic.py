"""GEMM, factorisations, TF32, and the classification of errors of a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.finding import Bench, Finding
from pipeline.device import fix_arithmetic
from swsc_core.method.svd import svd_by_eigenvectors
from swsc_core.method.weighted_kmeans import nearest

_ASSERT = "torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].sum().item()"
_FULL = "torch.empty(1 << 50, dtype=torch.uint8, device='cuda')"
_HALF = (
    "total = torch.cuda.get_device_properties(0).total_memory;"
    " torch.empty(int(0.6 * total), dtype=torch.uint8, device='cuda')"
)
# Runs a statement with half of the memory, and prints how its error is classified.
_SCRIPT = """import torch
from pipeline.device import is_out_of_memory, requires_new_process
try:
    torch.cuda.set_per_process_memory_fraction(0.5)
    {}
except BaseException as error:
    print(requires_new_process(error), is_out_of_memory(error), type(error).__name__)
"""


def tf32(bench: Bench) -> Iterator[Finding]:
    """TF32 that was switched on is switched off, and labels above 2048 are correct."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        fix_arithmetic(bench.device)
        off = not torch.backends.cuda.matmul.allow_tf32 or not bench.on_gpu
        yield Finding("TF32 that was on is off", "yes" if off else "no", ok=off)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before if not bench.on_gpu else False
    centroids = torch.arange(4096.0).reshape(-1, 1).repeat(1, 2).to(bench.device)
    labels = nearest(centroids + 0.25, centroids)
    correct = torch.equal(labels.cpu(), torch.arange(4096))
    yield Finding("nearest of 4096 centroids", "correct" if correct else "wrong", ok=correct)


def products(bench: Bench) -> Iterator[Finding]:
    """Operations per second of a GEMM, by dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        n = bench.size(4096, 256)
        matrix = torch.randn(n, n, dtype=torch.float32).to(bench.device, dtype)
        seconds = bench.seconds(partial(torch.matmul, matrix, matrix))
        yield Finding(f"GEMM {n}, {dtype}", 2 * n**3 / seconds / 1e12, "Top/s")


def factorisations(bench: Bench) -> Iterator[Finding]:
    """The SVD by eigenvectors and the SVDs of cuSOLVER, in seconds and error."""
    for m, n in ((1024, 4096), (2048, 2048)) if not bench.small else ((64, 128),):
        matrix = torch.randn(m, n).to(bench.device)
        yield Finding(f"SVD {m}×{n} by eigenvectors", bench.seconds(partial(svd_by_eigenvectors, matrix), 1), "s")
        for driver in ("gesvdj", "gesvd") if bench.on_gpu else (None,):
            call = partial(torch.linalg.svd, matrix, full_matrices=False, driver=driver)
            yield Finding(f"SVD {m}×{n} {driver or 'LAPACK'}", bench.seconds(call, 1), "s")
        u, s, vh = svd_by_eigenvectors(matrix)
        worst = float(((u * s) @ vh - matrix).abs().max())
        yield Finding(f"SVD {m}×{n} by eigenvectors, largest error", worst, "", worst < 1e-4)
        again = all(torch.equal(x, y) for x, y in zip((u, s, vh), svd_by_eigenvectors(matrix), strict=True))
        yield Finding(f"SVD {m}×{n} by eigenvectors, twice", "equal" if again else "different", ok=again)
    square = torch.randn(bench.size(4096, 64), bench.size(4096, 64)).to(bench.device)
    spd = square @ square.T + len(square) * torch.eye(len(square), device=bench.device)
    yield Finding(f"Cholesky {len(spd)}", bench.seconds(lambda: torch.linalg.cholesky(spd)), "s")


def errors(bench: Bench) -> Iterator[Finding]:
    """Real errors, each in its own process, are classified correctly."""
    if not bench.on_gpu:
        return
    for cause, statement, expected in (
        ("an index out of range", _ASSERT, "True False"),
        ("more memory than there is", _FULL, "True True"),
        ("more than a share of one half", _HALF, "True True"),
    ):
        script = _SCRIPT.format(statement)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        output = done.stdout.strip() or done.stderr.strip()[-200:]
        yield Finding(f"error of {cause}", output, ok=output.startswith(expected))
